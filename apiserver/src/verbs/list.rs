//! LIST: a selection of a snapshot, in pages where asked. All pages of a list are of one snapshot; the token that
//! continues a list names its revision and the last key, as upstream's does.

use std::sync::Arc;

use apimachinery::status::{Result, Status};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::get::{be_fresh, parse_version};
use super::{Call, store_failed};
use crate::cache::{Selection, Slot, Snapshot, Stored, range_within};

/// The parameters of a list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    pub selection: Selection,
    pub resource_version: Option<String>,
    /// `Exact`, `NotOlderThan`, or empty.
    pub resource_version_match: String,
    /// 0: no limit.
    pub limit: usize,
    pub continue_token: String,
}

/// One page.
#[derive(Clone, Debug, Default)]
pub struct List {
    pub items: Vec<Arc<Stored>>,
    pub revision: u64,
    /// Empty on the last page.
    pub continue_token: String,
    /// How many follow; unknown when labels or fields select.
    pub remaining: Option<usize>,
}

/// The content of a continue token.
#[derive(Serialize, Deserialize)]
struct Token {
    #[serde(rename = "v")]
    version: String,
    /// `NOW`: of the list's moment, which need not be that of the pages before.
    #[serde(rename = "rv")]
    revision: i64,
    /// The key to start at, below the list's prefix.
    start: String,
}

const TOKEN_VERSION: &str = "meta.k8s.io/v1";
const NOW: i64 = -1;

pub async fn list(call: &Call<'_>, options: &ListOptions) -> Result<List> {
    let version = options.resource_version.as_deref().unwrap_or_default();
    if !options.continue_token.is_empty() && !version.is_empty() && version != "0" {
        return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
    }
    let prefix = list_prefix(call);
    let (snapshot, start) = match options.continue_token.as_str() {
        "" => (first_snapshot(call, options).await?, prefix.clone()),
        token => {
            let token = decode_token(token)?;
            let start = format!("{prefix}{}", token.start);
            (continued_snapshot(call, &token).await?, start)
        }
    };
    options.selection.prepare(range_within(&snapshot.objects, &prefix, &start))?;
    Ok(page(call, options, &snapshot, &prefix, &start))
}

/// The objects as fresh as the request demands, or exactly those of a revision.
async fn first_snapshot(call: &Call<'_>, options: &ListOptions) -> Result<Snapshot> {
    let version = options.resource_version.as_deref();
    let malformed = |error: Status| Status::bad_request(format!("invalid resource version: {}", error.message));
    let revision = parse_version(version).map_err(malformed)?.unwrap_or(0);
    if options.resource_version_match == "Exact" {
        be_fresh(call, version).await?;
        return snapshot_at(call, revision).await;
    }
    be_fresh(call, version).await?;
    Ok(call.resource.cache.snapshot())
}

/// The snapshot that a token is about. One that nobody remembers is an error, which offers to go on with the present.
async fn continued_snapshot(call: &Call<'_>, token: &Token) -> Result<Snapshot> {
    let Ok(revision) = u64::try_from(token.revision) else {
        be_fresh(call, None).await?;
        return Ok(call.resource.cache.snapshot());
    };
    snapshot_at(call, revision).await.map_err(|mut status| {
        if status.reason == "Expired" {
            status.metadata.insert("continue".into(), encode_token(NOW, &token.start).into());
        }
        status
    })
}

/// The snapshot of a revision: one that is kept, or else what the store remembers.
async fn snapshot_at(call: &Call<'_>, revision: u64) -> Result<Snapshot> {
    let cache = &call.resource.cache;
    if let Some(snapshot) = cache.snapshot_at(revision) {
        return Ok(snapshot);
    }
    let mut objects = crate::cache::Objects::new();
    let mut after: Option<String> = None;
    loop {
        let page = call.server.store.range(cache.prefix(), after.as_deref(), 1000, Some(revision)).await;
        let page = page.map_err(|error| match error {
            crate::storage::StoreError::Compacted => expired(),
            error => store_failed(&error),
        })?;
        for entry in &page.entries {
            match Stored::decode(cache.kind(), &entry.key, &entry.value, entry.revision) {
                Ok(object) => drop(objects.insert(object.key.clone(), Arc::new(object).into())),
                Err(error) => tracing::error!(key = entry.key, %error, "cannot read what the store holds"),
            }
        }
        match page.entries.last() {
            Some(last) if page.more => after = Some(last.key.clone()),
            _ => break,
        }
    }
    let snapshot = Snapshot { objects, revision };
    cache.keep_snapshot(&snapshot);
    Ok(snapshot)
}

fn page(call: &Call<'_>, options: &ListOptions, snapshot: &Snapshot, prefix: &str, start: &str) -> List {
    // Who takes any state takes all of it at once: upstream's cache has no pages for it.
    let whole = options.limit == 0 || options.resource_version.as_deref() == Some("0");
    let limit = if whole { usize::MAX } else { options.limit };
    let filter = options.selection.filter();
    let mut rest = range_within(&snapshot.objects, prefix, start);
    let mut items = Vec::new();
    while items.len() < limit {
        match rest.next() {
            Some(slot) if filter.matches(slot) => items.push(slot.object.clone()),
            Some(_) => {}
            None => break,
        }
    }
    let mut list = List { items, revision: snapshot.revision, ..List::default() };
    if let Some(Slot { object: next, .. }) = rest.find(|slot| filter.matches(slot)) {
        list.continue_token = encode_token(i64::try_from(snapshot.revision).unwrap_or(NOW), &next.key[prefix.len()..]);
        list.remaining = (!options.selection.is_filtered()).then(|| rest.count() + 1);
        if options.continue_token.is_empty() {
            call.resource.cache.keep_snapshot(snapshot);
        }
    }
    list
}

/// The prefix of the keys that the list is about.
fn list_prefix(call: &Call<'_>) -> String {
    match call.namespace.as_str() {
        "" => call.resource.cache.prefix().to_owned(),
        namespace => format!("{}{namespace}/", call.resource.cache.prefix()),
    }
}

fn encode_token(revision: i64, start: &str) -> String {
    let token = Token { version: TOKEN_VERSION.into(), revision, start: start.to_owned() };
    serde_json::to_vec(&token).map(|text| URL_SAFE_NO_PAD.encode(text)).unwrap_or_default()
}

fn decode_token(token: &str) -> Result<Token> {
    let decoded = URL_SAFE_NO_PAD.decode(token).ok().and_then(|text| serde_json::from_slice::<Token>(&text).ok());
    match decoded {
        Some(token)
            if token.version == TOKEN_VERSION && !token.start.starts_with('/') && !token.start.contains("..") =>
        {
            Ok(token)
        }
        _ => Err(Status::bad_request("continue key is not valid: incorrect encoding or structure")),
    }
}

fn expired() -> Status {
    Status::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_and_forged_ones_do_not() {
        let token = decode_token(&encode_token(7, "default/a")).expect("own token");
        assert_eq!((token.revision, token.start.as_str()), (7, "default/a"));
        for forged in ["", "x", &URL_SAFE_NO_PAD.encode(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"../secrets"}"#)] {
            assert!(decode_token(forged).is_err(), "{forged}");
        }
    }
}
