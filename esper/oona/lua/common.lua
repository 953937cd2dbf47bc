-- What the scripts of a bus share; the first three of ARGV are the name of the bus, and the number
-- of partitions and the schema version that it is to have where it has none. All of it lies under
-- the name:
--   NAME:settings, NAME:topics, NAME:changes, NAME:letter and NAME:letter:NUMBER;
--   NAME:TOPIC:pN (streams), :ids, :meta, :groups, :letters;
--   NAME:TOPIC:GROUP:members and :leases, both of "token until seconds", times in milliseconds.
-- A stream's own group holds what is pending, under the token of who has it; under '-' lies what
-- was given back. Whoever has the lease of a partition may take what lies under another token.
local NAME = ARGV[1]
local FREED_AT_ONCE = 1000
local NOBODY = '-'
local ALONE = 3

local function key(topic, what)
  return NAME .. ':' .. topic .. ':' .. what
end

local function stream(topic, partition)
  return key(topic, 'p' .. partition)
end

local function now_of(given)
  if given then
    return given
  end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- A server that keeps nothing has lost them when it starts again: they are written once more.
local function partitions_of_bus()
  local settings = NAME .. ':settings'
  local partitions, version = unpack(redis.call('HMGET', settings, 'partitions', 'version'))
  if not (partitions and version) then
    redis.call('HSETNX', settings, 'partitions', ARGV[2])
    redis.call('HSETNX', settings, 'version', ARGV[3])
  end
  return tonumber(partitions or ARGV[2])
end

local function changed()
  redis.call('INCR', NAME .. ':changes')
end

local function parts(id)
  local first, second = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(first), tonumber(second)
end

local function before(one, other)
  local a, b = parts(one)
  local c, d = parts(other)
  return a < c or (a == c and b < d)
end

local function fields_of(entry)
  local found = {}
  for i = 1, #entry[2], 2 do
    found[entry[2][i]] = entry[2][i + 1]
  end
  return found
end

-- A map of what a command gives as a flat list.
local function map(list)
  local found = {}
  for i = 1, #list, 2 do
    found[list[i]] = list[i + 1]
  end
  return found
end

local function remove(topic, partition, entries)
  for _, entry in ipairs(entries) do
    local id = fields_of(entry)['i']
    if id then
      redis.call('HDEL', key(topic, 'ids'), id)
    end
    redis.call('XDEL', stream(topic, partition), entry[1])
  end
  -- The negative of nothing is no whole number to Redis.
  if #entries > 0 then
    redis.call('HINCRBY', key(topic, 'meta'), 'length', -#entries)
  end
end

-- The first message of a partition that some group has not acknowledged, as the end of a range;
-- nothing where there is no group.
local function unsettled(topic, partition)
  local first = nil
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream(topic, partition))) do
    local group = map(info)
    local id = group['last-delivered-id']
    local exclusive = false
    if group['pending'] > 0 then
      id = redis.call('XPENDING', stream(topic, partition), group['name'])[2]
      exclusive = true
    end
    if first == nil or before(id, first.id) or (id == first.id and exclusive) then
      first = { id = id, exclusive = exclusive }
    end
  end
  return first
end

-- At most so many of each partition.
local function free_acknowledged(topic, partitions, most)
  if redis.call('SCARD', key(topic, 'groups')) == 0 then
    return
  end
  for partition = 0, partitions - 1 do
    if redis.call('XLEN', stream(topic, partition)) > 0 then
      local first = unsettled(topic, partition)
      if first then
        local to = (first.exclusive and '(' or '') .. first.id
        remove(topic, partition,
          redis.call('XRANGE', stream(topic, partition), '-', to, 'COUNT', most))
      end
    end
  end
end

local function drop_oldest(topic, partitions, count)
  local heads = {}
  local function look(partition)
    heads[partition] = redis.call('XRANGE', stream(topic, partition), '-', '+', 'COUNT', 1)[1]
  end
  for partition = 0, partitions - 1 do
    look(partition)
  end
  local groups = redis.call('SMEMBERS', key(topic, 'groups'))
  for _ = 1, count do
    local oldest = nil
    for partition, entry in pairs(heads) do
      if oldest == nil or before(entry[1], heads[oldest][1]) then
        oldest = partition
      end
    end
    local id = heads[oldest][1]
    remove(topic, oldest, { heads[oldest] })
    for _, group in ipairs(groups) do
      redis.call('XACK', stream(topic, oldest), group, id)
    end
    look(oldest)
  end
  redis.call('HINCRBY', key(topic, 'meta'), 'dropped', count)
end

local function length_of(topic)
  return tonumber(redis.call('HGET', key(topic, 'meta'), 'length') or '0')
end

-- Append records of { topic, partition, id, only, body }, all or none of them.
local function append(records, capacity, refusing)
  local partitions = partitions_of_bus()
  local fresh, counts, seen = {}, {}, {}
  for _, record in ipairs(records) do
    local topic, id = record[1], record[3]
    local known = false
    if id ~= '' then
      local own = topic .. ' ' .. id
      known = seen[own] or redis.call('HEXISTS', key(topic, 'ids'), id) == 1
      seen[own] = true
    end
    if not known then
      fresh[#fresh + 1] = record
      counts[topic] = (counts[topic] or 0) + 1
    end
  end
  if refusing then
    for topic, count in pairs(counts) do
      local excess = length_of(topic) + count - capacity
      if excess > 0 then
        free_acknowledged(topic, partitions, excess + FREED_AT_ONCE)
        if length_of(topic) + count > capacity then
          return { 'FULL', topic, length_of(topic), count }
        end
      end
    end
  end
  for _, record in ipairs(fresh) do
    local topic, id, only = record[1], record[3], record[4]
    local values = { 'b', record[5] }
    if id ~= '' then
      redis.call('HSET', key(topic, 'ids'), id, '')
      values[3], values[4] = 'i', id
    end
    if only ~= '' then
      values[#values + 1] = 'o'
      values[#values + 1] = only
    end
    redis.call('XADD', stream(topic, record[2]), '*', unpack(values))
  end
  for topic, count in pairs(counts) do
    redis.call('SADD', NAME .. ':topics', topic)
    local length = redis.call('HINCRBY', key(topic, 'meta'), 'length', count)
    if length > capacity then
      free_acknowledged(topic, partitions, length - capacity + FREED_AT_ONCE)
      length = length_of(topic)
      if length > capacity then
        drop_oldest(topic, partitions, length - capacity)
      end
    end
  end
  return { 'DONE' }
end

-- Keep a dead letter; the oldest of its topic goes where there are too many.
local function bury(topic, group, reason, attempts, body, capacity)
  local number = redis.call('INCR', NAME .. ':letter')
  local time = redis.call('TIME')
  redis.call('HSET', NAME .. ':letter:' .. number, 'topic', topic, 'group', group, 'reason', reason,
    'attempts', attempts, 'at', time[1] .. '.' .. string.format('%06d', time[2]), 'body', body)
  redis.call('ZADD', key(topic, 'letters'), number, number)
  local excess = redis.call('ZCARD', key(topic, 'letters')) - capacity
  if excess > 0 then
    local gone = redis.call('ZPOPMIN', key(topic, 'letters'), excess)
    for i = 1, #gone, 2 do
      redis.call('DEL', NAME .. ':letter:' .. gone[i])
    end
    redis.call('HINCRBY', key(topic, 'meta'), 'dropped', excess)
  end
end

-- Have a group where there is none yet.
local function begin(topic, group, start)
  if redis.call('SISMEMBER', key(topic, 'groups'), group) == 1 then
    return
  end
  -- A group is known only once it has its streams: what fails on the way is done again.
  for partition = 0, partitions_of_bus() - 1 do
    redis.call('XGROUP', 'CREATE', stream(topic, partition), group,
      start == 'new' and '$' or '0', 'MKSTREAM')
  end
  redis.call('SADD', NAME .. ':topics', topic)
  redis.call('SADD', key(topic, 'groups'), group)
end

local function lease_of(text)
  local token, to, seconds = string.match(text, '^(%S+) (%S+) (%S+)$')
  return { token = token, to = tonumber(to), seconds = tonumber(seconds) }
end

local function lease_text(ask, now)
  return string.format('%s %.0f %.0f', ask.token, now + ask.lease, ask.lease)
end

-- One that begins in the future has run out: the clock was set back.
local function runs(lease, now)
  return lease.to - lease.seconds <= now and now < lease.to
end

local function leases_of(name)
  local found = {}
  for field, text in pairs(map(redis.call('HGETALL', name))) do
    found[field] = lease_of(text)
  end
  return found
end

local function let_go(topic, group, token)
  local name = key(topic, group .. ':leases')
  for partition, lease in pairs(leases_of(name)) do
    if lease.token == token then
      redis.call('HDEL', name, partition)
    end
  end
end

local function delivered_last(topic, partition, group)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream(topic, partition))) do
    local own = map(info)
    if own['name'] == group then
      return own['last-delivered-id']
    end
  end
  return '0-0'
end

-- Those of a group whose lease runs, the one who asks among them; nothing where another has its
-- name. The others are removed.
local function members_of(ask, topic, now)
  local name = key(topic, ask.group .. ':members')
  local found = leases_of(name)
  local own = found[ask.name]
  if own and own.token ~= ask.token then
    return nil
  end
  redis.call('HSET', name, ask.name, lease_text(ask, now))
  found[ask.name] = { token = ask.token, to = now + ask.lease, seconds = ask.lease }
  for each, lease in pairs(found) do
    if not runs(lease, now) then
      redis.call('HDEL', name, each)
      found[each] = nil
    end
  end
  return found
end

-- Renew what a member has of a topic, and see to its share; as `share` does in Python. Gives the
-- partitions to read, those to drain, those that are new, and when to look again; nothing where
-- another has its name.
local function sit(ask, topic, held, now)
  begin(topic, ask.group, 'all')
  local members = members_of(ask, topic, now)
  if members == nil then
    return nil
  end
  local partitions = partitions_of_bus()
  local name = key(topic, ask.group .. ':leases')
  local leases = leases_of(name)
  local own, count, soonest = {}, 0, now + ask.lease / 4
  for _, lease in pairs(members) do
    count = count + 1
    if lease.token ~= ask.token then
      soonest = math.min(soonest, lease.to)
    end
  end
  for partition = 0, partitions - 1 do
    local lease = leases[tostring(partition)]
    if lease and lease.token == ask.token then
      own[#own + 1] = partition
    elseif lease then
      soonest = math.min(soonest, lease.to)
    end
  end
  local fair = math.ceil(partitions / count)
  -- What is held is kept rather than what is not, and the lower numbers rather than the higher.
  table.sort(own, function(a, b)
    if (held[a] or false) ~= (held[b] or false) then
      return held[a] or false
    end
    return a < b
  end)
  local text = lease_text(ask, now)
  local read, drain, taken = {}, {}, {}
  for i, partition in ipairs(own) do
    if i <= fair or held[partition] then
      redis.call('HSET', name, partition, text)
      local list = i <= fair and read or drain
      list[#list + 1] = partition
    else
      redis.call('HDEL', name, partition)
      changed()
    end
  end
  for partition = 0, partitions - 1 do
    local lease = leases[tostring(partition)]
    if #read < fair and (not lease or (lease.token ~= ask.token and not runs(lease, now))) then
      redis.call('HSET', name, partition, text)
      read[#read + 1] = partition
      taken[#taken + 1] = partition
    end
  end
  table.sort(read)
  return { read = read, drain = drain, taken = taken, soonest = soonest }
end
