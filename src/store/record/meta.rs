//! The meta part of a record, serialized with postcard.
//!
//! Fields are never reordered or removed: a new layout needs a new version of the record.

use serde::{Deserialize, Serialize};

use super::RecordAddress;
use crate::policy::entry::Lifetimes;
use crate::policy::invalidation::tag::UpstreamId;

/// The beginning of every meta part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MetaStart<'a> {
    #[serde(borrow)]
    pub(super) address: MetaAddress<'a>,
    pub(super) seen: (u64, u64),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MetaAddress<'a> {
    pub(super) upstream: u64,
    pub(super) authority: &'a str,
    pub(super) target: &'a str,
}

/// The serialized form of [`Lifetimes`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "Lifetimes")]
struct MetaLifetimes {
    initial_age: u64,
    fresh_for: i64,
    while_revalidate: u64,
    if_error: u64,
    disconnected: u64,
    last_known_good: u64,
    validation: u64,
    always_validate: bool,
}

/// The meta part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Meta<'a> {
    #[serde(borrow)]
    pub(super) start: MetaStart<'a>,
    pub(super) status: u16,
    pub(super) received_at: u64,
    #[serde(with = "MetaLifetimes")]
    pub(super) lifetimes: Lifetimes,
    #[serde(borrow)]
    pub(super) vary: Vec<&'a str>,
    #[serde(borrow)]
    pub(super) headers: Vec<(&'a str, &'a [u8])>,
    pub(super) header_case: &'a [u8],
    #[serde(borrow)]
    pub(super) tags: Vec<&'a str>,
    pub(super) rule: &'a str,
}

impl From<MetaAddress<'_>> for RecordAddress {
    fn from(meta: MetaAddress<'_>) -> RecordAddress {
        let MetaAddress { upstream, authority, target } = meta;
        RecordAddress { upstream: UpstreamId(upstream), authority: authority.to_owned(), target: target.to_owned() }
    }
}
