//! GET of one object: from the cache, as fresh as asked.

use std::sync::Arc;

use apimachinery::status::{Result, Status};
use tokio::time::Instant;

use super::{Call, stale};
use crate::cache::Stored;
use crate::cache::freshness::WAIT;

/// The object `call.name`. `resource_version`: absent for the present state, `0` for any state, else one that is at
/// least that new.
pub async fn get(call: &Call<'_>, resource_version: Option<&str>) -> Result<Arc<Stored>> {
    be_fresh(call, resource_version).await?;
    call.resource.cache.get(&call.namespace, &call.name).ok_or_else(|| call.not_found(&call.name))
}

/// Waits until the cache is as new as a read demands.
pub async fn be_fresh(call: &Call<'_>, resource_version: Option<&str>) -> Result<()> {
    match parse_version(resource_version)? {
        None => call.refresh().await.map(drop),
        Some(0) if call.resource.cache.is_ready() => Ok(()),
        Some(revision) => {
            let deadline = Instant::now() + WAIT;
            let server = call.server;
            server.freshness.reach(&server.caches, revision.max(1), deadline).await.map_err(|error| stale(&error))
        }
    }
}

/// `None` when absent or empty.
pub fn parse_version(text: Option<&str>) -> Result<Option<u64>> {
    match text {
        None | Some("") => Ok(None),
        Some(text) => match text.parse() {
            Ok(revision) => Ok(Some(revision)),
            // Upstream takes it for a mistake of its own.
            Err(_) => Err(Status::failure(
                500,
                "",
                format!(
                    "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
                ),
            )),
        },
    }
}
