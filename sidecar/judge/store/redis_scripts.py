"""What has to happen in Redis as one step, in Lua. A script that is run twice does nothing the second time.

A decision is a hash: b its JSON, a action, r the action's strength, x expires, u undone, w by whom. What is stored
beside the JSON counts: Lua's numbers would break a key of 64 bits.
"""

from __future__ import annotations

import hashlib


class Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
"""

# of an entry that leaves the queue: what counts it and its client
_LEAVE = """
local function field(fields, name)
  for i = 1, #fields, 2 do if fields[i] == name then return fields[i + 1] end end
end
local function leave(group, entry, fields, queue, clients, waiting, errors)
  redis.call('XACK', queue, group, entry)
  redis.call('XDEL', queue, entry)
  local client = field(fields, 'c')
  if client and redis.call('HINCRBY', clients, client, -1) <= 0 then redis.call('HDEL', clients, client) end
  local id = field(fields, 'i')
  if id then redis.call('HDEL', waiting, id) end
  redis.call('HDEL', errors, entry)
end
"""

# KEYS queue clients waiting; ARGV queue_max per_client_max, then client id body of each
PUT = Script("""
local depth = redis.call('XLEN', KEYS[1])
if depth == 0 and redis.call('HLEN', KEYS[3]) > 0 then redis.call('DEL', KEYS[2], KEYS[3]) end
local taken = {}
for i = 3, #ARGV, 3 do
  local client, id, body = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HEXISTS', KEYS[3], id) == 1 then
    taken[#taken + 1] = 2
  else
    local room = tonumber(ARGV[1]) - depth
    local share = math.max(1, math.min(tonumber(ARGV[2]), math.floor(room / 8)))
    if room > 0 and tonumber(redis.call('HGET', KEYS[2], client) or 0) < share then
      local entry = redis.call('XADD', KEYS[1], '*', 'c', client, 'i', id, 'e', body)
      redis.call('HINCRBY', KEYS[2], client, 1)
      redis.call('HSET', KEYS[3], id, entry)
      depth = depth + 1
      taken[#taken + 1] = 1
    else
      taken[#taken + 1] = 0
    end
  end
end
return taken
""")

# KEYS queue clients waiting errors dead; ARGV group consumer idle_ms count cursor deliveries_max dead_max quiet_ms
RECLAIM = Script(
    _LEAVE
    + """
local group, found, buried = ARGV[1], {}, 0
local got = redis.call('XAUTOCLAIM', KEYS[1], group, ARGV[2], ARGV[3], ARGV[5], 'COUNT', ARGV[4])
for _, entry in ipairs(got[2]) do
  if entry and entry[2] then
    local pending = redis.call('XPENDING', KEYS[1], group, entry[1], entry[1], 1)
    local tries = pending[1] and pending[1][4] or 1
    if tries > tonumber(ARGV[6]) then
      local why = redis.call('HGET', KEYS[4], entry[1]) or 'taken, but never settled'
      redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[7], '*', 'c', field(entry[2], 'c') or '0',
        'i', field(entry[2], 'i') or '', 'e', field(entry[2], 'e') or '', 'n', tries - 1, 'w', why)
      leave(group, entry[1], entry[2], KEYS[1], KEYS[2], KEYS[3], KEYS[4])
      buried = buried + 1
    else
      found[#found + 1] = {entry[1], entry[2], tries}
    end
  end
end
if got[1] == '0-0' then
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], group)) do
    local name, pending, idle = consumer[2], consumer[4], consumer[6]
    if pending == 0 and idle > tonumber(ARGV[8]) and name ~= ARGV[2] then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], group, name)
    end
  end
end
return {got[1], found, buried}
"""
)

# KEYS queue clients waiting errors dead; ARGV group entry error deliveries_max dead_max; 0 unknown, 1 noted, 2 buried
FAIL = Script(
    _LEAVE
    + """
local group, id = ARGV[1], ARGV[2]
local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
if not entry then return 0 end
local pending = redis.call('XPENDING', KEYS[1], group, id, id, 1)
local tries = pending[1] and pending[1][4] or 1
if tries < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[4], id, ARGV[3])
  return 1
end
redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[5], '*', 'c', field(entry[2], 'c') or '0',
  'i', field(entry[2], 'i') or '', 'e', field(entry[2], 'e') or '', 'n', tries, 'w', ARGV[3])
leave(group, id, entry[2], KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return 2
"""
)

# KEYS queue clients waiting dead; ARGV queue_max, then the dead letters' ids
RETRY_DEAD = Script("""
local moved = 0
for i = 2, #ARGV do
  if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then break end
  local entry = redis.call('XRANGE', KEYS[4], ARGV[i], ARGV[i])[1]
  if entry then
    local fields = {}
    for j = 1, #entry[2], 2 do fields[entry[2][j]] = entry[2][j + 1] end
    if redis.call('HEXISTS', KEYS[3], fields['i']) == 0 then
      local new = redis.call('XADD', KEYS[1], '*', 'c', fields['c'], 'i', fields['i'], 'e', fields['e'])
      redis.call('HINCRBY', KEYS[2], fields['c'], 1)
      redis.call('HSET', KEYS[3], fields['i'], new)
      moved = moved + 1
    end
    redis.call('XDEL', KEYS[4], ARGV[i])
  end
end
return moved
""")

# 1 it changed something, 0 it didn't, -1 refused
_DECIDE = (
    _NOW
    + """
local function decide(index, changes, counter, most, kept, dkey, idkey, member, action, rank, expires, body, replace)
  if tonumber(expires) <= now then return 0 end
  local old = redis.call('HMGET', dkey, 'x', 'r', 'u', 'a')
  local lives = old[1] and tonumber(old[1]) > now
  if lives and replace == '0' then
    if old[3] == '1' then return -1 end
    local later, stronger = tonumber(expires) > tonumber(old[1]), tonumber(rank) > tonumber(old[2])
    if not later and not stronger then return 0 end
    if not later then expires = old[1] end
    if not stronger then rank, action = old[2], old[4] end
  elseif not lives then
    if redis.call('ZCARD', index) >= tonumber(most) then
      redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
      if redis.call('ZCARD', index) >= tonumber(most) then return -1 end
    end
  end
  local until_ms = string.format('%.0f', math.ceil(tonumber(expires) * 1000))
  redis.call('HSET', dkey, 'b', body, 'a', action, 'r', rank, 'x', expires, 'u', '0', 'w', '')
  redis.call('PEXPIREAT', dkey, until_ms)
  redis.call('ZADD', index, expires, member)
  redis.call('SET', idkey, member)
  redis.call('PEXPIREAT', idkey, until_ms)
  local n = redis.call('INCR', counter)
  redis.call('XADD', changes, 'MAXLEN', '~', kept, '*', 'n', n, 'b', body, 'a', action, 'x', expires, 'u', '0', 'w', '')
  return 1
end
"""
)

# KEYS queue clients waiting errors judged index changes counter, then decision and id of each;
# ARGV group decisions_max changes_max judged_max replace, number of decisions, number of receipts,
# then member action rank expires body of each, the receipts, escalation and JSON of each judgement
SETTLE = Script(
    _LEAVE
    + _DECIDE
    + """
local group, made, refused, settled = ARGV[1], 0, 0, 0
local at = 8
for i = 1, tonumber(ARGV[6]) do
  local result = decide(KEYS[6], KEYS[7], KEYS[8], ARGV[2], ARGV[3], KEYS[7 + 2 * i], KEYS[8 + 2 * i],
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[5])
  if result > 0 then made = made + 1 elseif result < 0 then refused = refused + 1 end
  at = at + 5
end
local bodies = {}
for _ = 1, tonumber(ARGV[7]) do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[at], ARGV[at])[1]
  if entry then
    bodies[field(entry[2], 'i')] = field(entry[2], 'e')
    leave(group, ARGV[at], entry[2], KEYS[1], KEYS[2], KEYS[3], KEYS[4])
    settled = settled + 1
  end
  at = at + 1
end
while at < #ARGV do
  if bodies[ARGV[at]] then
    redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[4], '*', 'i', ARGV[at], 'j', ARGV[at + 1], 'e', bodies[ARGV[at]])
  end
  at = at + 2
end
return {made, refused, settled}
"""
)

# KEYS decision changes counter; ARGV who changes_max
UNDO = Script(
    _NOW
    + """
local d = redis.call('HMGET', KEYS[1], 'b', 'a', 'x', 'u')
if not d[1] or d[4] == '1' or tonumber(d[3]) <= now then return false end
redis.call('HSET', KEYS[1], 'u', '1', 'w', ARGV[1])
local n = redis.call('INCR', KEYS[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*',
  'n', n, 'b', d[1], 'a', d[2], 'x', d[3], 'u', '1', 'w', ARGV[1])
return {d[1], d[2], d[3], '1', ARGV[1]}
"""
)

# KEYS queue clients waiting errors; ARGV group, then entries that waited too long
EXPIRE = Script(
    _LEAVE
    + """
local gone = 0
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    leave(ARGV[1], ARGV[i], entry[2], KEYS[1], KEYS[2], KEYS[3], KEYS[4])
    gone = gone + 1
  end
end
return gone
"""
)

# KEYS decisions
READ = Script("""
local found = {}
for i = 1, #KEYS do found[i] = redis.call('HMGET', KEYS[i], 'b', 'a', 'x', 'u', 'w') end
return found
""")

# KEYS any of ours: in a Cluster its node's clock counts
CLOCK = Script("return redis.call('TIME')")
