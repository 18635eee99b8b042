//! The paths that are no resources: discovery, health, version, metrics, the keys of service account tokens, and the
//! list of all these at `/`.

use std::sync::Arc;

use apimachinery::status::Status;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use super::discovery::json_response;
use super::resources::method_not_allowed;
use super::{RequestInfo, Response, discovery, health, metrics, openapi, version};
use crate::server::Server;

/// The answer to a request that is not about a resource.
pub async fn route(
    server: &Arc<Server>,
    info: &RequestInfo,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Status> {
    if info.path.starts_with("/version") && method != Method::GET {
        return Err(method_not_allowed());
    }
    match answer(server, info, headers).await {
        Some(answer) => Ok(answer),
        None if is_nowhere(server, &info.path) => Ok(not_found()),
        None => Err(Status::path_not_found()),
    }
}

/// Whether a path is in no part of the API. Within a group upstream says so as JSON, elsewhere as a page.
pub fn is_nowhere(server: &Server, path: &str) -> bool {
    let mut segments = path.split('/').skip(1);
    match (segments.next(), segments.next()) {
        (Some("api"), _) => false,
        (Some("apis"), Some(group)) => !server.registry.has_group(group),
        _ => true,
    }
}

/// What is at a path that is nowhere.
pub fn not_found() -> Response {
    health::text(StatusCode::NOT_FOUND, "404 page not found\n".into())
}

async fn answer(server: &Arc<Server>, info: &RequestInfo, headers: &HeaderMap) -> Option<Response> {
    match info.path.as_str() {
        "/" => Some(json_response(StatusCode::OK, &json!({"paths": paths(server)}))),
        "/version" | "/version/" => Some(json_response(StatusCode::OK, &version::document())),
        "/metrics" => {
            let mut response = health::text(StatusCode::OK, metrics::render(server));
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            Some(response)
        }
        "/openid/v1/jwks" => Some(jwks(server)),
        "/.well-known/openid-configuration" => Some(openid_configuration(server)),
        path if path.starts_with("/openapi/") => openapi::answer(server, info, headers).await,
        path => match discovery::answer(server, path, headers) {
            Some(answer) => Some(answer),
            None => health::answer(server, info).await,
        },
    }
}

fn cacheable(document: &Value, content_type: &'static str) -> Response {
    let mut response = json_response(StatusCode::OK, document);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
    response
}

fn jwks(server: &Server) -> Response {
    let keys: Vec<&Value> = server.auth.service_accounts().keys().iter().map(|key| &key.jwk).collect();
    cacheable(&json!({"keys": keys}), "application/jwk-set+json")
}

fn openid_configuration(server: &Server) -> Response {
    let tokens = server.auth.service_accounts();
    let mut algorithms: Vec<String> = tokens.keys().iter().map(|key| format!("{:?}", key.algorithm)).collect();
    algorithms.sort();
    algorithms.dedup();
    let jwks_uri = match server.config.service_account_jwks_uri.as_str() {
        "" => format!("{}/openid/v1/jwks", tokens.issuer()),
        given => given.to_owned(),
    };
    let document = json!({
        "issuer": tokens.issuer(),
        "jwks_uri": jwks_uri,
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": algorithms,
    });
    cacheable(&document, "application/json")
}

fn paths(server: &Server) -> Vec<String> {
    let fixed = [
        "/.well-known/openid-configuration",
        "/api",
        "/api/v1",
        "/apis",
        "/apis/",
        "/healthz",
        "/livez",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/openapi/v3/",
        "/openid/v1/jwks",
        "/readyz",
        "/version",
    ];
    let mut paths: Vec<String> = fixed.iter().map(|path| (*path).to_owned()).collect();
    for resource in server.registry.all() {
        for served in resource.versions.iter().filter(|served| !served.gvr.group.is_empty()) {
            paths.push(format!("/apis/{}", served.gvr.group));
            paths.push(format!("/apis/{}/{}", served.gvr.group, served.gvr.version));
        }
    }
    paths.sort();
    paths.dedup();
    paths
}
