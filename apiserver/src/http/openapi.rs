//! `/openapi/v2` and `/openapi/v3`: the schema of everything that is served, for `kubectl explain` and for validation
//! by clients. Documents are made when somebody asks and not kept: clients keep them, by hash and entity tag.

use std::io::Write;
use std::sync::Arc;

use apimachinery::meta::GroupVersion;
use apimachinery::schema::{ApiResource, openapi};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderName, HeaderValue,
    IF_NONE_MATCH, LOCATION, VARY,
};
use http::{HeaderMap, StatusCode};
use serde_json::Value;

use super::{RequestInfo, Response, full};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const JSON: &str = "application/json";
const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
/// How clients ask for it, from old to new.
const V2_PROTOBUF_NAMES: [&str; 2] = [
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
];

/// Which document a path is about.
enum Document {
    Index,
    V3(GroupVersion),
    V2 { protobuf: bool },
}

impl Document {
    fn at(path: &str, headers: &HeaderMap) -> Option<Self> {
        match path.trim_end_matches('/') {
            "/openapi/v2" => Some(Self::V2 { protobuf: accepts(headers, &V2_PROTOBUF_NAMES) }),
            "/openapi/v3" => Some(Self::Index),
            path => {
                let root = path.strip_prefix("/openapi/v3/")?;
                let parts: Vec<&str> = root.split('/').collect();
                match parts.as_slice() {
                    ["api", version] => Some(Self::V3(GroupVersion::new("", (*version).to_owned()))),
                    ["apis", group, version] => {
                        Some(Self::V3(GroupVersion::new((*group).to_owned(), (*version).to_owned())))
                    }
                    _ => None,
                }
            }
        }
    }

    /// The document's bytes; `None` when there is no such group and version.
    fn make(&self, offer: &Offer) -> Option<Vec<u8>> {
        match self {
            Self::Index => Some(openapi::v3_index(&offer.builtin, &offer.documents()).to_string().into_bytes()),
            Self::V3(version) => openapi::v3(version, &offer.builtin, &*descriptions(Some(version))).or_else(|| {
                let kinds = offer.of(version);
                let machinery = GroupVersion::new("", "v1");
                let describe = || descriptions(Some(&machinery));
                (!kinds.is_empty()).then(|| openapi::v3_custom(version, &kinds, &*describe()))
            }),
            Self::V2 { protobuf: false } => Some(openapi::v2(&offer.builtin, &offer.all(), &*descriptions(None))),
            Self::V2 { protobuf: true } => {
                Some(openapi::v2_protobuf(&offer.builtin, &offer.all(), &*descriptions(None)))
            }
        }
    }

    /// What identifies the present content of the document.
    fn hash(&self, root: &str, offer: &Offer) -> String {
        match self {
            Self::V3(version) => offer.hash(root, version),
            Self::Index | Self::V2 { .. } => openapi::hash(&format!("{root}{}", offer.key(|_, _| true))),
        }
    }
}

/// What is served.
#[derive(Default)]
struct Offer {
    builtin: Vec<&'static ApiResource>,
    /// The definitions of custom resources.
    definitions: Vec<Value>,
}

impl Offer {
    fn read(server: &Server) -> Self {
        let is_served = |api: &&ApiResource| {
            let resource = server.registry.get(api.group, api.resource);
            resource.is_some_and(|resource| !resource.custom && resource.version(api.version).is_some())
        };
        let builtin = apimachinery::schema::builtin().resources().iter().filter(is_served).collect();
        let Some(cache) = server.caches.get("apiextensions.k8s.io", "customresourcedefinitions") else {
            return Self { builtin, definitions: Vec::new() };
        };
        let is_served = |definition: &Value| {
            let spec = &definition["spec"];
            server.registry.get(spec.str_at(&["group"]), spec.str_at(&["names", "plural"])).is_some_and(|r| r.custom)
        };
        let definitions = cache.list(None).iter().map(|stored| stored.value()).filter(is_served).collect();
        Self { builtin, definitions }
    }

    fn all(&self) -> Vec<openapi::CustomKind<'_>> {
        self.definitions.iter().flat_map(kinds_of).collect()
    }

    fn of(&self, version: &GroupVersion) -> Vec<openapi::CustomKind<'_>> {
        self.all().into_iter().filter(|k| k.group == version.group && k.version == version.version).collect()
    }

    /// Which generations of which definitions a document is made of.
    fn key(&self, concerns: impl Fn(&str, &str) -> bool) -> String {
        let mut key = String::new();
        for definition in &self.definitions {
            if kinds_of(definition).iter().any(|kind| concerns(kind.group, kind.version)) {
                let generation = definition.i64_at(&["metadata", "generation"]).unwrap_or(0);
                key.push_str(&format!(" {}/{}/{generation}", definition.name(), definition.uid()));
            }
        }
        key
    }

    fn hash(&self, root: &str, version: &GroupVersion) -> String {
        let key = self.key(|group, name| group == version.group && name == version.version);
        openapi::hash(&format!("{root}{key}"))
    }

    /// Path and hash of the version 3 document of each group and version.
    fn documents(&self) -> Vec<(String, String)> {
        let mut documents: Vec<(String, String)> = Vec::new();
        for kind in self.all() {
            let root = format!("apis/{}/{}", kind.group, kind.version);
            if documents.iter().all(|(known, _)| *known != root) {
                let version = GroupVersion::new(kind.group.to_owned(), kind.version.to_owned());
                let hash = self.hash(&root, &version);
                documents.push((root, hash));
            }
        }
        documents
    }
}

/// The served versions of a definition.
fn kinds_of(definition: &Value) -> Vec<openapi::CustomKind<'_>> {
    let spec = &definition["spec"];
    let versions = spec.list_at(&["versions"]).iter().filter(|version| version["served"] == true);
    versions
        .map(|version| openapi::CustomKind {
            group: spec.str_at(&["group"]),
            version: version.str_at(&["name"]),
            kind: spec.str_at(&["names", "kind"]),
            list_kind: spec.str_at(&["names", "listKind"]),
            resource: spec.str_at(&["names", "plural"]),
            namespaced: spec.str_at(&["scope"]) == "Namespaced",
            schema: version.at(&["schema", "openAPIV3Schema"]),
            has_status: version["subresources"]["status"].is_object(),
            has_scale: version["subresources"]["scale"].is_object(),
            selectable: {
                let fields = version.list_at(&["selectableFields"]).iter();
                fields.map(|field| field.str_at(&["jsonPath"]).trim_start_matches('.')).collect()
            },
        })
        .collect()
}

type Describe = Box<dyn Fn(&str) -> Option<openapi::Description>>;

/// The prose of a group and version, or of all.
#[cfg(feature = "descriptions")]
fn descriptions(version: Option<&GroupVersion>) -> Describe {
    let found = version.map_or_else(openapi::descriptions::of_all, openapi::descriptions::of);
    Box::new(move |name| found.get(name))
}

#[cfg(not(feature = "descriptions"))]
fn descriptions(_: Option<&GroupVersion>) -> Describe {
    Box::new(|_| None)
}

fn accepts(headers: &HeaderMap, kinds: &[&str]) -> bool {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut kinds_asked =
        lines.flat_map(|line| line.split(',')).map(|accept| accept.split(';').next().unwrap_or_default().trim());
    // The first that we have counts; JSON is always had.
    kinds_asked
        .find(|kind| kinds.contains(kind) || matches!(*kind, JSON | "*/*" | "application/*"))
        .is_some_and(|kind| kinds.contains(&kind))
}

/// The answer to a path below `/openapi/`; `None` for paths without a document.
pub async fn answer(server: &Arc<Server>, info: &RequestInfo, headers: &HeaderMap) -> Option<Response> {
    let document = Document::at(&info.path, headers)?;
    let content_type = if matches!(document, Document::V2 { protobuf: true }) { V2_PROTOBUF } else { JSON };
    let root = info.path.trim_end_matches('/').trim_start_matches("/openapi/v3/").to_owned();
    let offer = Offer::read(server);
    let hash = document.hash(&root, &offer);
    if let (Document::V3(_), Some(asked)) = (&document, info.param("hash"))
        && asked != hash
    {
        return Some(moved(&format!("/openapi/v3/{root}?hash={hash}")));
    }
    let is_pinned = info.param("hash").is_some();
    let etag = format!("\"{hash}\"");
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == etag.as_bytes()) {
        return Some(finish(Vec::new(), StatusCode::NOT_MODIFIED, &etag, content_type, is_pinned));
    }
    let wants_gzip =
        headers.get(ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).is_some_and(|line| line.contains("gzip"));
    let made = tokio::task::spawn_blocking(move || {
        let bytes = document.make(&offer)?;
        Some(if wants_gzip { gzip(&bytes).map_or((bytes, false), |packed| (packed, true)) } else { (bytes, false) })
    });
    let (bytes, packed) = match made.await {
        Ok(made) => made?,
        Err(error) => {
            tracing::error!(%error, path = info.path, "an OpenAPI document could not be made");
            return None;
        }
    };
    let mut response = finish(bytes, StatusCode::OK, &etag, content_type, is_pinned);
    if packed {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Some(response)
}

fn gzip(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).ok()?;
    encoder.finish().ok()
}

fn moved(location: &str) -> Response {
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    set(&mut response, LOCATION, location);
    response
}

fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// Documents that were asked for by their hash never change.
fn finish(bytes: Vec<u8>, status: StatusCode, etag: &str, content_type: &str, is_pinned: bool) -> Response {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    set(&mut response, CONTENT_TYPE, content_type);
    set(&mut response, ETAG, etag);
    set(&mut response, VARY, "Accept-Encoding, Accept");
    set(&mut response, CACHE_CONTROL, if is_pinned { "public, immutable" } else { "no-cache, private" });
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_what_the_client_lists_first() {
        for (accept, protobuf) in [
            ("application/com.github.proto-openapi.spec.v2@v1.0+protobuf", true),
            ("application/json, application/com.github.proto-openapi.spec.v2@v1.0+protobuf", false),
            ("application/com.github.proto-openapi.spec.v2.v1.0+protobuf;q=1, */*", true),
            ("*/*", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(accepts(&headers, &V2_PROTOBUF_NAMES), protobuf, "{accept}");
        }
    }

    #[test]
    fn paths_name_documents() {
        let offer = Offer { builtin: apimachinery::schema::builtin().resources().iter().collect(), ..Offer::default() };
        let made = |path: &str| Document::at(path, &HeaderMap::new()).and_then(|document| document.make(&offer));
        assert!(made("/openapi/v3").is_some());
        assert!(made("/openapi/v3/apis/apps/v1").is_some());
        assert!(made("/openapi/v3/apis/nothing/v1").is_none());
        assert!(made("/openapi/v4").is_none());
    }
}
