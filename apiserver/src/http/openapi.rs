//! `/openapi/v2` and `/openapi/v3`: the schema of everything that is served, for `kubectl explain` and for validation
//! by clients.

use std::sync::Arc;

use http::HeaderMap;

use super::{RequestInfo, Response};
use crate::server::Server;

/// The answer to a path below `/openapi/`; `None` for paths without a document.
pub async fn answer(_server: &Arc<Server>, _info: &RequestInfo, _headers: &HeaderMap) -> Option<Response> {
    None
}
