//! The meta part of a record, as postcard reads and writes it. Fields are never reordered or removed: a new layout is a
//! new version of the record.

use serde::{Deserialize, Serialize};

use super::WireAddress;
use crate::policy::entry::Terms;
use crate::policy::tags::UpstreamId;

/// How every meta part begins.
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
    pub(super) casing: &'a [u8],
    #[serde(borrow)]
    pub(super) tags: Vec<&'a str>,
    pub(super) rule: &'a str,
}

impl From<Terms> for MetaTerms {
    fn from(terms: Terms) -> MetaTerms {
        let Terms { initial_age, fresh_for, while_revalidate, if_error, disconnected, .. } = terms;
        let Terms { last_known_good, validation, always_validate, .. } = terms;
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

impl From<MetaTerms> for Terms {
    fn from(meta: MetaTerms) -> Terms {
        let MetaTerms { initial_age, fresh_for, while_revalidate, if_error, disconnected, .. } = meta;
        let MetaTerms { last_known_good, validation, always_validate, .. } = meta;
        Terms {
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

impl From<MetaAddress<'_>> for WireAddress {
    fn from(meta: MetaAddress<'_>) -> WireAddress {
        let MetaAddress { upstream, authority, target } = meta;
        WireAddress { upstream: UpstreamId(upstream), authority: authority.to_owned(), target: target.to_owned() }
    }
}
