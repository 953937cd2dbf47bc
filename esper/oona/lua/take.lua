-- ARGV from 4: what is asked. Messages that are for a member now, and what it has.
-- Gives a state ('REPLACED', or 'SAT' with what it has, or 'SAME'), the messages as
-- { topic, partition, id, attempt, body }, the slots that were read to their end or not, and the
-- last id that was delivered of each.
local ask = cjson.decode(ARGV[4])
local now = now_of(ask.now)
local group = ask.group
local moved = {}
for _, slot in ipairs(ask.moved) do
  moved[slot[1] .. ' ' .. slot[2]] = true
end

local function held_of(topic)
  local found = {}
  for _, place in ipairs(ask.held) do
    if place[1] == topic then
      found[place[2]] = true
    end
  end
  return found
end

-- Whether all that this member reads is still its own, and nobody came or went.
local function same()
  if ask.due or redis.call('GET', NAME .. ':changes') ~= ask.seen then
    return false
  end
  for _, slot in ipairs(ask.slots) do
    local lease = redis.call('HGET', key(slot[1], group .. ':leases'), slot[2])
    if not lease or lease_of(lease).token ~= ask.token then
      return false
    end
  end
  return true
end

local state, slots = { 'SAME' }, ask.slots
if not same() then
  slots = {}
  local drained, settled, soonest = {}, true, nil
  for _, topic in ipairs(ask.topics) do
    local sitting = sit(ask, topic, held_of(topic), now)
    if sitting == nil then
      return { { 'REPLACED' } }
    end
    for _, partition in ipairs(sitting.read) do
      slots[#slots + 1] = { topic, partition, delivered_last(topic, partition, group) }
    end
    for _, partition in ipairs(sitting.drain) do
      drained[#drained + 1] = { topic, partition }
      settled = false
    end
    for _, partition in ipairs(sitting.taken) do
      moved[topic .. ' ' .. partition] = true
    end
    soonest = math.min(soonest or sitting.soonest, sitting.soonest)
  end
  local had = {}
  for _, slot in ipairs(ask.slots) do
    had[slot[1] .. ' ' .. slot[2]] = true
  end
  for _, slot in ipairs(slots) do
    if not had[slot[1] .. ' ' .. slot[2]] then
      moved[slot[1] .. ' ' .. slot[2]] = true
    end
  end
  local seen = settled and redis.call('GET', NAME .. ':changes') or ''
  state = { 'SAT', seen, math.floor(math.max(0, soonest - now)), slots, drained }
end

-- Messages that were taken in a call whose answer never came: nobody has seen them.
if ask.doubt then
  local held = {}
  for _, place in ipairs(ask.held) do
    held[place[1] .. ' ' .. place[2] .. ' ' .. place[3]] = true
  end
  for _, slot in ipairs(slots) do
    local name, from = stream(slot[1], slot[2]), '-'
    repeat
      local rows = redis.call('XPENDING', name, group, from, '+', 1000, ask.token)
      for _, row in ipairs(rows) do
        if not held[slot[1] .. ' ' .. slot[2] .. ' ' .. row[1]] then
          redis.call('XCLAIM', name, group, NOBODY, 0, row[1], 'RETRYCOUNT', row[4] - 1, 'JUSTID')
          moved[slot[1] .. ' ' .. slot[2]] = true
        end
        from = '(' .. row[1]
      end
    until #rows < 1000
  end
end

local found = {}

local function give(topic, partition, id, attempt, body)
  found[#found + 1] = { topic, partition, id, attempt, body }
end

-- Consumers of a stream's group that have gone and left nothing.
local function tidy(name)
  for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', name, group)) do
    local own = map(info)
    if own['name'] ~= ask.token and own['name'] ~= NOBODY and own['pending'] == 0 then
      redis.call('XGROUP', 'DELCONSUMER', name, group, own['name'])
    end
  end
end

-- Add what was delivered and is to be delivered again: 'on', 'next' slot, or 'stop'.
local function take_again(topic, partition, name)
  local from = '-'
  repeat
    local rows = redis.call('XPENDING', name, group, from, '+', 1000)
    for _, row in ipairs(rows) do
      local id, owner, attempts = row[1], row[2], row[4]
      from = '(' .. id
      if owner ~= ask.token then
        if #found == ask.most then
          return 'stop'
        end
        local entry = redis.call('XRANGE', name, id, id)[1]
        if entry == nil then
          redis.call('XACK', name, group, id)
        elseif attempts >= ask.max_deliveries then
          local times = attempts == 1 and 'once' or attempts .. ' times'
          bury(topic, group, string.format(ask.exhausted, times), attempts,
            fields_of(entry)['b'], ask.capacity)
          redis.call('XACK', name, group, id)
        else
          local alone = attempts + 1 >= ALONE
          if alone and #found > 0 then
            return 'next'
          end
          redis.call('XCLAIM', name, group, ask.token, 0, id)
          give(topic, partition, id, attempts + 1, fields_of(entry)['b'])
          if alone then
            return 'stop'
          end
        end
      end
    end
  until #rows < 1000
  moved[topic .. ' ' .. partition] = nil
  tidy(name)
  return 'on'
end

-- Add what was never delivered; whether there may be more.
local function take_new(slot, name)
  while #found < ask.most do
    local room = ask.most - #found
    local got = redis.call('XREADGROUP', 'GROUP', group, ask.token, 'COUNT', room,
      'STREAMS', name, '>')
    if not got then
      return false
    end
    for _, entry in ipairs(got[1][2]) do
      local fields = fields_of(entry)
      if fields['o'] and fields['o'] ~= group then
        redis.call('XACK', name, group, entry[1])
      else
        give(slot[1], slot[2], entry[1], 1, fields['b'])
      end
      slot[3] = entry[1]
    end
    if #got[1][2] < room then
      return false
    end
  end
  return true
end

for turn = 1, #slots do
  local slot = slots[(turn + ask.turn) % #slots + 1]
  local name, go = stream(slot[1], slot[2]), 'on'
  if moved[slot[1] .. ' ' .. slot[2]] then
    go = take_again(slot[1], slot[2], name)
  end
  if go == 'stop' or (go == 'on' and take_new(slot, name)) then
    break
  end
end

local rest = {}
for _, slot in ipairs(slots) do
  if moved[slot[1] .. ' ' .. slot[2]] then
    rest[#rest + 1] = { slot[1], slot[2] }
  end
end
return { state, found, rest, slots }
