-- ARGV from 4: capacity, full, then topic, partition, id and body of each message.
local records = {}
for i = 6, #ARGV, 4 do
  records[#records + 1] = { ARGV[i], ARGV[i + 1], ARGV[i + 2], '', ARGV[i + 3] }
end
return append(records, tonumber(ARGV[4]), ARGV[5] == 'refuse')
