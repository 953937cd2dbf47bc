-- ARGV: name, limit, and a topic or nothing. Dead letters, oldest first.
local topics = ARGV[3] ~= '' and { ARGV[3] } or redis.call('SMEMBERS', NAME .. ':topics')
local limit, numbers, found = tonumber(ARGV[2]), {}, {}
if limit == 0 then
  return found
end
for _, topic in ipairs(topics) do
  for _, number in ipairs(redis.call('ZRANGE', key(topic, 'letters'), 0, limit - 1)) do
    numbers[#numbers + 1] = tonumber(number)
  end
end
table.sort(numbers)
for i = 1, math.min(limit, #numbers) do
  local letter = redis.call('HMGET', NAME .. ':letter:' .. string.format('%.0f', numbers[i]),
    'topic', 'group', 'reason', 'attempts', 'at', 'body')
  found[i] = { numbers[i], unpack(letter) }
end
return found
