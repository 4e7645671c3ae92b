//! Where records lie, and with what they are sealed: what reading, writing and walking have in common.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::wire::Sealing;
use crate::policy::key::is_private;
use crate::policy::variant::Variant;
use crate::redis::{Class, Redis};

/// All records of a fleet.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) redis: Arc<Redis>,
    /// `{prefix}:1`.
    prefix: Box<str>,
    sealing: ArcSwap<Sealing>,
}

/// Which record is meant: what a request's key and headers say.
#[derive(Debug, Clone)]
pub struct Place {
    pub(super) class: Class,
    /// The plain key.
    pub(super) plain: Box<str>,
}

impl Records {
    pub(super) fn new(redis: Arc<Redis>, prefix: &str, sealing: Sealing) -> Records {
        Records { redis, prefix: format!("{prefix}:1").into(), sealing: ArcSwap::from_pointee(sealing) }
    }

    pub(super) fn sealing(&self) -> Arc<Sealing> {
        self.sealing.load_full()
    }

    /// From now on they are sealed so.
    pub(super) fn seal_with(&self, change: impl FnOnce(&Sealing) -> Sealing) {
        let changed = change(&self.sealing.load());
        self.sealing.store(Arc::new(changed));
    }

    /// Where the record for a key lies.
    pub(super) fn place(&self, key: &[u8]) -> Place {
        let class = if is_private(key) { Class::Private } else { Class::Shared };
        let plain = format!("{}{}", self.keys_of(class), blake3::hash(key).to_hex()).into();
        Place { class, plain }
    }

    /// All keys of a class begin so.
    pub(super) fn keys_of(&self, class: Class) -> String {
        format!("{}:{}:", self.prefix, class.token())
    }
}

impl Place {
    /// A name for it, without prefix: the digest of its key in hex, whose beginning is what `Cache-Status` shows
    /// ([`crate::policy::key::short_name`]).
    pub fn name(&self) -> &str {
        self.plain.rsplit(':').next().unwrap_or_default()
    }

    /// The key of what these requests headers select.
    pub(super) fn of(&self, variant: &Variant) -> String {
        if variant.0.is_empty() {
            return self.plain.to_string();
        }
        format!("{}:{}", self.plain, &variant.digest().to_hex()[..32])
    }
}
