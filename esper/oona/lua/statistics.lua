-- ARGV from 4: the time or nothing. For each topic its length, what was dropped and its dead letters,
-- then for each of its groups the lag, what is pending, and how many members are there.
local now = now_of(tonumber(ARGV[4]))
local partitions = partitions_of_bus()
local found = {}

-- Messages that were never delivered: Redis knows their number by itself as long as none of them
-- was removed.
local function count_after(name, id)
  local count, from = 0, '(' .. id
  repeat
    local rows = redis.call('XRANGE', name, from, '+', 'COUNT', 1000)
    count = count + #rows
    if #rows > 0 then
      from = '(' .. rows[#rows][1]
    end
  until #rows < 1000
  return count
end

local topics = redis.call('SMEMBERS', NAME .. ':topics')
table.sort(topics)
for _, topic in ipairs(topics) do
  local groups = {}
  local dropped = tonumber(redis.call('HGET', key(topic, 'meta'), 'dropped') or '0')
  for _, group in ipairs(redis.call('SMEMBERS', key(topic, 'groups'))) do
    local alive = 0
    for _, lease in pairs(leases_of(key(topic, group .. ':members'))) do
      alive = alive + (runs(lease, now) and 1 or 0)
    end
    groups[group] = { group, 0, 0, alive }
  end
  for partition = 0, partitions - 1 do
    local name = stream(topic, partition)
    if next(groups) then
      for _, info in ipairs(redis.call('XINFO', 'GROUPS', name)) do
        local own = map(info)
        local group = groups[own['name']]
        local known = dropped == 0 and own['lag']
        group[2] = group[2] + (known or count_after(name, own['last-delivered-id']))
        group[3] = group[3] + own['pending']
      end
    end
  end
  local list = {}
  for _, group in pairs(groups) do
    list[#list + 1] = group
  end
  table.sort(list, function(a, b)
    return a[1] < b[1]
  end)
  found[#found + 1] = {
    topic, length_of(topic), dropped, redis.call('ZCARD', key(topic, 'letters')), list,
  }
end
return found
