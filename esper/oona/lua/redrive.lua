-- ARGV from 4: capacity, full, then number, topic, partition and body of each letter.
local records, there = {}, {}
for i = 6, #ARGV, 4 do
  local group = redis.call('HGET', NAME .. ':letter:' .. ARGV[i], 'group')
  if group then
    there[#there + 1] = { ARGV[i], ARGV[i + 1] }
    records[#records + 1] = { ARGV[i + 1], ARGV[i + 2], '', group, ARGV[i + 3] }
  end
end
local outcome = append(records, tonumber(ARGV[4]), ARGV[5] == 'refuse')
if outcome[1] == 'DONE' then
  for _, letter in ipairs(there) do
    redis.call('DEL', NAME .. ':letter:' .. letter[1])
    redis.call('ZREM', key(letter[2], 'letters'), letter[1])
  end
  outcome[2] = #there
end
return outcome
