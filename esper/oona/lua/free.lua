-- ARGV from 4: full, and topics. Make room in a server whose memory is full, and give how many
-- messages went for it: those of all topics that all their groups have acknowledged, or where there
-- are none and the bus drops, the oldest of that of the topics named that takes the most memory.

-- Few, for the bodies are read with the messages, and a full server has no room for many.
local GONE_AT_ONCE = 100

local partitions = partitions_of_bus()
local freed = 0
for _, topic in ipairs(redis.call('SMEMBERS', NAME .. ':topics')) do
  local length = length_of(topic)
  free_acknowledged(topic, partitions, GONE_AT_ONCE)
  freed = freed + length - length_of(topic)
end
if freed > 0 or ARGV[4] ~= 'drop' then
  return freed
end

local function memory_of(topic)
  local bytes = redis.call('MEMORY', 'USAGE', key(topic, 'ids')) or 0
  for partition = 0, partitions - 1 do
    bytes = bytes + (redis.call('MEMORY', 'USAGE', stream(topic, partition)) or 0)
  end
  return bytes
end

local function info(field)
  return tonumber(string.match(redis.call('INFO', 'memory'), '\n' .. field .. ':(%d+)'))
end

local held, most, largest = 0, 0, nil
for i = 5, #ARGV do
  local bytes = memory_of(ARGV[i])
  held = held + bytes
  if bytes > most and length_of(ARGV[i]) > 0 then
    most, largest = bytes, ARGV[i]
  end
end
-- Where others have filled the memory, dropping all of these topics would lose much and win nothing.
local others = info('used_memory') - info('mem_not_counted_for_evict') - held
if largest == nil or others > info('maxmemory') then
  return 0
end
local count = math.ceil(math.min(length_of(largest) / 16, GONE_AT_ONCE))
drop_oldest(largest, partitions, count)
return count
