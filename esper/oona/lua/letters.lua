-- ARGV from 4: limit, and topics. Dead letters, oldest first.
local limit, numbers, found = tonumber(ARGV[4]), {}, {}
if limit == 0 then
  return found
end
for i = 5, #ARGV do
  for _, number in ipairs(redis.call('ZRANGE', key(ARGV[i], 'letters'), 0, limit - 1)) do
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
