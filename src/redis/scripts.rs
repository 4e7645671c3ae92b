//! Lua that must be one step on the server.

use std::time::Duration;

use fred::interfaces::{ClientLike, FredResult};
use fred::types::cluster::ClusterRouting;
use fred::types::{ClusterHash, CustomCommand, FromValue, Value};
use fred::util::sha1_hash;

use super::Trouble;
use super::link::{Asking, Link};

/// Adds an entry to the log, with the id of the one before it. ARGV: how many to keep, what it says. A log that is not
/// there begins with an entry that says nothing: so everything that is ever fetched has an entry before it.
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

/// Takes a lease, or gets in line for the news of its end. KEYS: lease, line. ARGV: token, milliseconds, my inbox, and
/// the token of a holder who is to be replaced.
/// Returns the milliseconds it has left, 0 if it is ours, and its holder's token.
pub(super) const CLAIM: &str = "
if ARGV[4] ~= '' and redis.call('GET', KEYS[1]) == ARGV[4] then redis.call('DEL', KEYS[1]) end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {0, ''} end
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[2], 60000)
return {math.max(1, redis.call('PTTL', KEYS[1])), redis.call('GET', KEYS[1])}";

/// Says that a sidecar is there, and counts those that are. KEYS: sidecars. ARGV: me, seconds after which one is gone.
pub(super) const PRESENT: &str = "
local now = tonumber(redis.call('TIME')[1])
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now, ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])";

/// Keeps a lease, if it is still ours. KEYS: lease. ARGV: token, milliseconds.
pub(super) const RENEW: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";

/// Gives a lease back, if it is still ours, and tells all who wait. KEYS: lease, line. ARGV: token, what to tell, key
/// prefix of inboxes.
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

/// Adds work, unless its like was added a while ago. KEYS: mark, work. ARGV: milliseconds, how many to keep, what it says.
pub(super) const OFFER: &str = "
if not redis.call('SET', KEYS[1], '', 'NX', 'PX', ARGV[1]) then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'm', ARGV[3])
return 1";

/// Makes the group of workers, and forgets those that have been away for an hour and have left nothing. KEYS: work.
/// ARGV: group.
pub(super) const TIDY: &str = "
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
for _, worker in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local of = {}
  for i = 1, #worker, 2 do of[worker[i]] = worker[i + 1] end
  if of['pending'] == 0 and of['idle'] > 3600000 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of['name'])
  end
end
return 0";

/// Removes a value if it still begins so. KEYS: value. ARGV: its beginning.
pub(super) const REMOVE: &str = "
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
return redis.call('UNLINK', KEYS[1])";

/// The slot of a key.
pub(super) fn slot_of(key: &str) -> u16 {
    ClusterRouting::hash_key(key.as_bytes())
}

impl Link {
    /// Runs a script by its digest, or, where the server does not know it, by its text. All keys are in one slot.
    pub(super) async fn script<R: FromValue>(
        &self,
        deadline: Duration,
        text: &'static str,
        keys: Vec<String>,
        arguments: Vec<Value>,
    ) -> Result<R, Trouble> {
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

async fn call<R: FromValue>(client: &Asking, name: &'static str, slot: u16, values: Vec<Value>) -> FredResult<R> {
    client.custom(CustomCommand::new_static(name, ClusterHash::Custom(slot), false), values).await
}
