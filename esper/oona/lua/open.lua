-- The partitions and the schema version of the bus, which begins here where there is none.
local partitions = partitions_of_bus()
return { partitions, redis.call('HGET', NAME .. ':settings', 'version') }
