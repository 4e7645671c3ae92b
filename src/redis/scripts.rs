//! Lua scripts, for operations that must be atomic on the server.

use std::time::Duration;

use fred::interfaces::{ClientLike, FredResult};
use fred::types::cluster::ClusterRouting;
use fred::types::{ClusterHash, CustomCommand, FromValue, Value};
use fred::util::sha1_hash;

use super::RedisError;
use super::connection::{SupervisedConnection, TimedClient};

/// Appends purges to the log, each with the ID of the entry before it, and skips those that it already has.
/// KEYS: log, numbers of the last purge of each sidecar. ARGV: number of entries to keep, bytes to keep, own ID, then
/// number and content of each purge. The field `bytes` of the numbers counts all bytes ever appended, and each entry
/// has the count at its end, so that the size of the log is the difference between the last entry and the first.
pub(super) const APPEND: &str = "
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local previous = last[1] and last[1][1]
if not previous then return redis.error_reply('ERR the invalidation log is missing') end
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[3]) or '0')
local bytes = 0
for at = 4, #ARGV, 2 do
  local number = tonumber(ARGV[at])
  if number > known then
    bytes = redis.call('HINCRBY', KEYS[2], 'bytes', #ARGV[at + 1])
    previous = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'p', previous, 'b', ARGV[at + 1], 's', bytes)
    known = number
  end
end
if bytes > 0 then
  redis.call('HSET', KEYS[2], ARGV[3], known)
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][2]
  local before = 0
  for at = 1, #first, 2 do if first[at] == 's' then before = tonumber(first[at + 1]) end end
  if bytes - before > tonumber(ARGV[2]) then
    redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', math.floor(redis.call('XLEN', KEYS[1]) / 2))
  end
end
return previous";

/// Announces a sidecar, and starts a new epoch of the log if its end may have been lost. KEYS: sidecars (a sorted set:
/// ID, and the time at which the log had all purges of the sidecar), log, epoch, numbers of the last purge of each
/// sidecar, mode, sidecars expected in this epoch, inbox of this sidecar. ARGV: own ID, milliseconds since the log had all purges of this
/// sidecar (0: it has), milliseconds after which a sidecar is forgotten, ID of the server, the epoch in which this sidecar found the log
/// broken, content of a reset entry, a nonce, the epoch and the number of sidecars in the last reply.
///
/// The epoch names the server (its run ID) that wrote it: on a server that was restarted, or promoted, it is another's.
/// The server may have lost sidecars then. Those that return report how many there were (`members`); until as many have
/// returned, the log is complete only up to the beginning of the epoch (`since`).
/// Returns the server's time in milliseconds, the epoch, the ID of the last log entry, the number of sidecars, the
/// milliseconds since the oldest time among the sidecars, the mode of the fleet, and the ID of the last message in the
/// inbox.
pub(super) const BEAT: &str = "
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local ending = last[1] and last[1][1]
local epoch = redis.call('GET', KEYS[3])
local server = epoch and string.match(epoch, '^(%S+) ')
if not ending then redis.call('DEL', KEYS[4]) end
if not ending or server ~= ARGV[4] or epoch == ARGV[5] then
  ending = redis.call('XADD', KEYS[2], '*', 'p', ending or '0-0', 'b', ARGV[6])
  epoch = ARGV[4] .. ' ' .. ARGV[7]
  redis.call('SET', KEYS[3], epoch)
  redis.call('DEL', KEYS[6])
  redis.call('HSET', KEYS[6], 'since', now)
  redis.call('PEXPIRE', KEYS[6], ARGV[3])
end
local since = redis.call('HGET', KEYS[6], 'since')
if since and ARGV[8] ~= epoch then
  local kind = ARGV[8] == '' and 'new' or 'returned'
  if redis.call('HSETNX', KEYS[6], 'id ' .. ARGV[1], kind) == 1 then redis.call('HINCRBY', KEYS[6], kind, 1) end
  local known = tonumber(redis.call('HGET', KEYS[6], 'members') or '0')
  if ARGV[8] ~= '' and tonumber(ARGV[9]) > known then redis.call('HSET', KEYS[6], 'members', ARGV[9]) end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now + 1, '+inf')) do redis.call('ZADD', KEYS[1], now, id) end
if ARGV[2] == '0' then
  redis.call('ZADD', KEYS[1], now, ARGV[1])
else
  redis.call('ZADD', KEYS[1], 'NX', now - math.min(ARGV[2], ARGV[3] / 2), ARGV[1])
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3])) do
  redis.call('ZREM', KEYS[1], id)
  redis.call('HDEL', KEYS[4], id)
end
local complete = tonumber(redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or now)
local members = redis.call('ZCARD', KEYS[1])
if since then
  local counts = redis.call('HMGET', KEYS[6], 'members', 'returned', 'new')
  local expected = tonumber(counts[1] or '0')
  if expected > tonumber(counts[2] or '0') then complete = math.min(complete, since) end
  members = math.max(members, expected + tonumber(counts[3] or '0'))
end
local message = redis.call('XREVRANGE', KEYS[7], '+', '-', 'COUNT', 1)[1]
return {now, epoch, ending, members, math.max(0, now - complete), redis.call('GET', KEYS[5]) or '',
  message and message[1] or '0-0'}";

/// Removes a sidecar that shuts down. KEYS: sidecars, numbers, its inbox, sidecars expected in this epoch. ARGV: its ID.
pub(super) const LEAVE: &str = "
local kind = redis.call('HGET', KEYS[4], 'id ' .. ARGV[1])
if kind then
  redis.call('HDEL', KEYS[4], 'id ' .. ARGV[1])
  redis.call('HINCRBY', KEYS[4], kind, -1)
  if kind == 'returned' then redis.call('HINCRBY', KEYS[4], 'members', -1) end
end
redis.call('DEL', KEYS[3])
redis.call('HDEL', KEYS[2], ARGV[1])
return redis.call('ZREM', KEYS[1], ARGV[1])";

/// Claims a lease, or registers to be notified of its release. KEYS: lease, set of waiting inboxes, mark of a recent
/// release. ARGV: token, milliseconds, own inbox, and the token of a holder to be replaced.
/// Returns the milliseconds until it expires, or 0 if it was claimed, its holder's token, and 1 if it was released lately.
pub(super) const CLAIM: &str = "
if ARGV[4] ~= '' and redis.call('GET', KEYS[1]) == ARGV[4] then redis.call('DEL', KEYS[1]) end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return {0, '', redis.call('EXISTS', KEYS[3])}
end
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[2], 60000)
return {math.max(1, redis.call('PTTL', KEYS[1])), redis.call('GET', KEYS[1]), 0}";

/// Renews a lease, if this sidecar still holds it. KEYS: lease. ARGV: token, milliseconds.
pub(super) const RENEW: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";

/// Releases a lease, if this sidecar still holds it, and marks that for a time longer than the lookups before a claim
/// take. KEYS: lease, set of waiting inboxes, mark. ARGV: token, milliseconds. Returns the waiting inboxes.
pub(super) const RELEASE: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {} end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[3], '', 'PX', ARGV[2])
local waiting = redis.call('SMEMBERS', KEYS[2])
redis.call('DEL', KEYS[2])
return waiting";

/// Sends a message to an inbox. KEYS: inbox. ARGV: message.
pub(super) const SEND: &str = "
redis.call('XADD', KEYS[1], 'MAXLEN', '~', 1000, '*', 'm', ARGV[1])
return redis.call('PEXPIRE', KEYS[1], 60000)";

/// Adds a refresh to the queue, unless the same was added within a time. KEYS: mark, queue. ARGV: milliseconds, number
/// of entries to keep, content.
pub(super) const OFFER_REFRESH: &str = "
if not redis.call('SET', KEYS[1], '', 'NX', 'PX', ARGV[1]) then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'm', ARGV[3])
return 1";

/// Creates the consumer group, and removes consumers idle for an hour that have nothing pending. KEYS: queue.
/// ARGV: group.
pub(super) const PREPARE_GROUP: &str = "
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
for _, worker in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local of = {}
  for i = 1, #worker, 2 do of[worker[i]] = worker[i + 1] end
  if of['pending'] == 0 and of['idle'] > 3600000 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of['name'])
  end
end
return 0";

/// Removes a value if it still begins with the given bytes. KEYS: value. ARGV: its first bytes.
pub(super) const REMOVE_UNCHANGED: &str = "
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
return redis.call('UNLINK', KEYS[1])";

/// Returns the hash slot of a key.
pub(super) fn slot_of(key: &str) -> u16 {
    ClusterRouting::hash_key(key.as_bytes())
}

impl SupervisedConnection {
    /// Runs a script by its digest (EVALSHA), or by its text (EVAL) if the server does not know it. All keys are in one
    /// slot.
    pub(super) async fn script<R: FromValue>(
        &self,
        deadline: Duration,
        text: &'static str,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, RedisError> {
        self.run(deadline, |client| async move {
            let slot = slot_of(keys.first().map_or("", String::as_str));
            let mut values = vec![Value::from(sha1_hash(text)), Value::from(i64::try_from(keys.len()).unwrap_or(0))];
            values.extend(keys.into_iter().map(Value::from));
            values.extend(arguments);
            match call(&client, "EVALSHA", slot, values.clone()).await {
                Err(error) if error.details().starts_with("NOSCRIPT") => {
                    values[0] = Value::from(text);
                    call(&client, "EVAL", slot, values).await
                }
                result => result,
            }
        })
        .await
    }
}

async fn call<R: FromValue>(
    client: &TimedClient,
    name: &'static str,
    slot: u16,
    values: Vec<Value>,
) -> FredResult<R> {
    client.custom(CustomCommand::new_static(name, ClusterHash::Custom(slot), false), values).await
}
