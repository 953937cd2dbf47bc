-- ARGV from 4: what is asked. Go, and leave everything to the others.
local ask = cjson.decode(ARGV[4])
for _, topic in ipairs(ask.topics) do
  local name = key(topic, ask.group .. ':members')
  local own = redis.call('HGET', name, ask.name)
  if own and lease_of(own).token == ask.token then
    redis.call('HDEL', name, ask.name)
  end
  let_go(topic, ask.group, ask.token)
end
changed()
