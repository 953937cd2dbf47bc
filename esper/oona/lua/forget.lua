-- ARGV from 4: group. Remove all that is known of a group.
for _, topic in ipairs(redis.call('SMEMBERS', NAME .. ':topics')) do
  if redis.call('SREM', key(topic, 'groups'), ARGV[4]) == 1 then
    for partition = 0, partitions_of_bus() - 1 do
      redis.call('XGROUP', 'DESTROY', stream(topic, partition), ARGV[4])
    end
  end
  redis.call('DEL', key(topic, ARGV[4] .. ':members'), key(topic, ARGV[4] .. ':leases'))
end
changed()
