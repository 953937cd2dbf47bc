-- ARGV from 4: what is asked. Come into a group, under the name of whoever was there before.
local ask = cjson.decode(ARGV[4])
local now = now_of(ask.now)
for _, topic in ipairs(ask.topics) do
  begin(topic, ask.group, ask.start)
  local name = key(topic, ask.group .. ':members')
  local before_it = redis.call('HGET', name, ask.name)
  if before_it then
    let_go(topic, ask.group, lease_of(before_it).token)
  end
  redis.call('HSET', name, ask.name, lease_text(ask, now))
end
changed()
