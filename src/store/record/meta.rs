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

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MetaTerms {
    pub(super) initial_age: u64,
    pub(super) fresh_for: i64,
    pub(super) while_revalidate: u64,
    pub(super) if_error: u64,
    pub(super) disconnected: u64,
    pub(super) last_known_good: u64,
    pub(super) validation: u64,
    pub(super) always_validate: bool,
}

/// The meta part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Meta<'a> {
    #[serde(borrow)]
    pub(super) start: MetaStart<'a>,
    pub(super) status: u16,
    pub(super) born: u64,
    pub(super) terms: MetaTerms,
    #[serde(borrow)]
    pub(super) vary: Vec<&'a str>,
    #[serde(borrow)]
    pub(super) headers: Vec<(&'a str, &'a [u8])>,
    pub(super) header_case: &'a [u8],
    #[serde(borrow)]
    pub(super) tags: Vec<&'a str>,
    pub(super) rule: &'a str,
}

impl From<Lifetimes> for MetaTerms {
    fn from(terms: Lifetimes) -> MetaTerms {
        let Lifetimes { initial_age, fresh_for, while_revalidate, if_error, disconnected, .. } = terms;
        let Lifetimes { last_known_good, validation, always_validate, .. } = terms;
        MetaTerms {
            initial_age,
            fresh_for,
            while_revalidate,
            if_error,
            disconnected,
            last_known_good,
            validation,
            always_validate,
        }
    }
}

impl From<MetaTerms> for Lifetimes {
    fn from(meta: MetaTerms) -> Lifetimes {
        let MetaTerms { initial_age, fresh_for, while_revalidate, if_error, disconnected, .. } = meta;
        let MetaTerms { last_known_good, validation, always_validate, .. } = meta;
        Lifetimes {
            initial_age,
            fresh_for,
            while_revalidate,
            if_error,
            disconnected,
            last_known_good,
            validation,
            always_validate,
        }
    }
}

impl From<MetaAddress<'_>> for RecordAddress {
    fn from(meta: MetaAddress<'_>) -> RecordAddress {
        let MetaAddress { upstream, authority, target } = meta;
        RecordAddress { upstream: UpstreamId(upstream), authority: authority.to_owned(), target: target.to_owned() }
    }
}
