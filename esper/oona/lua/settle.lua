-- ARGV from 4: what is asked, and the places as topic, partition and id of each message. Gives those
-- that are another's by now, and renews the leases where that is due.
local ask = cjson.decode(ARGV[4])
local now = now_of(ask.now)
local lost, there = {}, {}
for _, topic in ipairs(ask.topics) do
  there[topic] = redis.call('SISMEMBER', key(topic, 'groups'), ask.group) == 1
  local name = key(topic, ask.group .. ':members')
  local own = redis.call('HGET', name, ask.name)
  if own and lease_of(own).token ~= ask.token then
    return { 'REPLACED' }
  end
  if ask.renew then
    local text = lease_text(ask, now)
    redis.call('HSET', name, ask.name, text)
    local leases = key(topic, ask.group .. ':leases')
    for partition, lease in pairs(leases_of(leases)) do
      if lease.token == ask.token then
        redis.call('HSET', leases, partition, text)
      end
    end
  end
end
for i = 5, #ARGV, 3 do
  local topic, partition, id = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local name, group = stream(topic, partition), ask.group
  local row = there[topic] and redis.call('XPENDING', name, group, id, id, 1)[1]
  if row and row[2] == NOBODY and ask.outcome == 'back' then
    row = nil -- done by a call whose answer was lost
  elseif row and row[2] ~= ask.token then
    lost[#lost + 1] = (i - 5) / 3
  elseif row and ask.outcome == 'back' then
    redis.call('XCLAIM', name, group, NOBODY, 0, id, 'JUSTID')
  elseif row then
    if ask.outcome == 'dead' then
      local entry = redis.call('XRANGE', name, id, id)[1]
      if entry then
        bury(topic, group, ask.reason, row[4], fields_of(entry)['b'], ask.capacity)
      end
    end
    redis.call('XACK', name, group, id)
  end
end
return { 'DONE', lost }
