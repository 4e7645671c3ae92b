//! Lua scripts, for operations that must be atomic on the server.

use std::time::Duration;

use fred::interfaces::{ClientLike, FredResult};
use fred::types::cluster::ClusterRouting;
use fred::types::{ClusterHash, CustomCommand, FromValue, Value};
use fred::util::sha1_hash;

use super::RedisError;
use super::connection::{SupervisedConnection, TimedClient};

/// Appends an entry to the log, with the ID of the entry before it. KEYS: log. ARGV: number of entries to keep,
/// content. A new log begins with an empty entry, so that every fetch has an entry before it.
pub(super) const APPEND: &str = "
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local previous = last[1] and last[1][1]
if not previous then
  previous = redis.call('XADD', KEYS[1], '*', 'p', '0-0', 'b', '')
  if ARGV[2] == '' then return previous end
elseif ARGV[2] == '' then
  return previous
end
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'p', previous, 'b', ARGV[2])";

/// Claims a lease, or registers to be notified of its release. KEYS: lease, set of waiting inboxes. ARGV: token,
/// milliseconds, own inbox, and the token of a holder to be replaced.
/// Returns the milliseconds until it expires, or 0 if it was claimed, and its holder's token.
pub(super) const CLAIM: &str = "
if ARGV[4] ~= '' and redis.call('GET', KEYS[1]) == ARGV[4] then redis.call('DEL', KEYS[1]) end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {0, ''} end
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[2], 60000)
return {math.max(1, redis.call('PTTL', KEYS[1])), redis.call('GET', KEYS[1])}";

/// Announces a sidecar, and counts those present. KEYS: sidecars. ARGV: own ID, seconds after which a sidecar is gone.
pub(super) const PRESENT: &str = "
local now = tonumber(redis.call('TIME')[1])
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])";

/// Renews a lease, if this sidecar still holds it. KEYS: lease. ARGV: token, milliseconds.
pub(super) const RENEW: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";

/// Releases a lease, if this sidecar still holds it, and sends a message to all waiting inboxes. KEYS: lease, set of
/// waiting inboxes. ARGV: token, message, key prefix of inboxes.
pub(super) const RELEASE: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
local waiting = redis.call('SMEMBERS', KEYS[2])
redis.call('DEL', KEYS[2])
for _, inbox in ipairs(waiting) do
  redis.call('XADD', ARGV[3] .. inbox, 'MAXLEN', '~', 1000, '*', 'm', ARGV[2])
  redis.call('PEXPIRE', ARGV[3] .. inbox, 60000)
end
return #waiting";

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
