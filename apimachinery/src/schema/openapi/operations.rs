//! What can be done at a path, and how both dialects write it down.

use serde_json::{Map, Value, json};

use super::definitions::Flavor;

/// One HTTP method of one path.
pub struct Operation<'r> {
    /// `get`, `post`, …
    pub method: &'static str,
    /// `list`, `deletecollection`, `connect`, …; empty where the path is about no resource.
    pub action: &'static str,
    pub id: String,
    pub tag: String,
    pub summary: String,
    /// Query parameters, in alphabetical order.
    pub parameters: Vec<Parameter>,
    pub body: Body,
    /// The definition of the answer; `None` for streams and proxies.
    pub answer: Option<String>,
    /// Group, version and kind that the operation is about, if it is about one.
    pub kind: Option<(&'r str, &'r str, &'r str)>,
    /// About a custom resource, which knows fewer formats.
    pub custom: bool,
}

pub enum Body {
    None,
    Object(String),
    Optional(String),
    Patch,
}

/// A query parameter: name, JSON type, purpose.
pub type Parameter = (&'static str, &'static str, &'static str);

pub const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";

const PATCH_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];
const MEDIA_TYPES: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const CUSTOM_TYPES: [&str; 2] = ["application/json", "application/yaml"];
const STREAM_TYPES: [&str; 2] = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];

impl Operation<'_> {
    /// The definitions it refers to.
    pub fn definitions(&self) -> impl Iterator<Item = String> + '_ {
        let body = match &self.body {
            Body::None => None,
            Body::Object(name) | Body::Optional(name) => Some(name.clone()),
            Body::Patch => Some(PATCH.to_owned()),
        };
        self.answer.clone().into_iter().chain(body)
    }

    fn media_types(&self) -> Vec<&'static str> {
        if self.custom {
            return CUSTOM_TYPES.to_vec();
        }
        let more: &[&str] = match self.action {
            "list" | "watch" | "watchlist" => &STREAM_TYPES,
            "connect" => return vec!["*/*"],
            _ if self.is_log() => return [&["text/plain"], &MEDIA_TYPES[..]].concat(),
            _ => &[],
        };
        [&MEDIA_TYPES[..], more].concat()
    }

    fn is_log(&self) -> bool {
        self.id.ends_with("PodLog")
    }

    /// The answers that mean success: created objects and accepted deletions have codes of their own.
    fn successes(&self) -> &'static [(&'static str, &'static str)] {
        match self.action {
            "post" => &[("200", "OK"), ("201", "Created"), ("202", "Accepted")],
            "patch" if self.custom => &[("200", "OK")],
            "put" | "patch" => &[("200", "OK"), ("201", "Created")],
            "delete" => &[("200", "OK"), ("202", "Accepted")],
            _ => &[("200", "OK")],
        }
    }

    /// Without those of `shared`, which stand beside the path's operations.
    fn render(&self, shared: &[Parameter], flavor: Flavor) -> Value {
        let mut out = json!({"description": self.summary, "operationId": self.id, "tags": [self.tag]});
        if !self.action.is_empty() {
            out["x-kubernetes-action"] = json!(self.action);
        }
        if let Some((group, version, kind)) = self.kind {
            out["x-kubernetes-group-version-kind"] = json!({"group": group, "version": version, "kind": kind});
        }
        let own = self.parameters.iter().filter(|parameter| !shared.contains(parameter));
        let mut parameters: Vec<Value> =
            own.map(|(name, kind, about)| parameter("query", name, kind, about, flavor)).collect();
        let mut responses = Map::new();
        for (code, text) in self.successes() {
            responses.insert((*code).to_owned(), self.response(text, flavor));
        }
        responses.insert("401".into(), json!({"description": "Unauthorized"}));
        out["responses"] = Value::Object(responses);
        match (flavor, &self.body) {
            (_, Body::None) => {}
            (Flavor::V3, _) => out["requestBody"] = self.request_body(),
            (Flavor::V2, Body::Object(name)) => parameters.insert(0, body_parameter(name, true)),
            (Flavor::V2, Body::Optional(name)) => parameters.insert(0, body_parameter(name, false)),
            (Flavor::V2, Body::Patch) => parameters.insert(0, body_parameter(PATCH, true)),
        }
        if flavor == Flavor::V2 {
            out["consumes"] = match (&self.body, self.kind) {
                (Body::Patch, _) => json!(PATCH_TYPES),
                (_, Some(_)) => json!(["*/*"]),
                (_, None) => json!(self.media_types()),
            };
            out["produces"] = json!(self.media_types());
            out["schemes"] = json!(["https"]);
        }
        if !parameters.is_empty() {
            out["parameters"] = Value::Array(parameters);
        }
        out
    }

    fn response(&self, text: &str, flavor: Flavor) -> Value {
        let mut out = json!({ "description": text });
        let schema = match (&self.answer, flavor) {
            (Some(name), flavor) => flavor.reference(name),
            (None, Flavor::V2) => json!({"type": "string"}),
            (None, Flavor::V3) => {
                out["content"] = json!({"*/*": {"schema": {"type": "string"}}});
                return out;
            }
        };
        match flavor {
            Flavor::V2 => out["schema"] = schema,
            Flavor::V3 => {
                let types = self.media_types().into_iter().map(|t| (t.to_owned(), json!({ "schema": schema })));
                out["content"] = Value::Object(types.collect());
            }
        }
        out
    }

    fn request_body(&self) -> Value {
        let of = |types: &[&str], name: &str| {
            let schema = Flavor::V3.reference(name);
            let content: Map<String, Value> =
                types.iter().map(|t| ((*t).to_owned(), json!({ "schema": schema }))).collect();
            json!({ "content": content })
        };
        let mut body = match &self.body {
            Body::None => json!({}),
            Body::Object(name) | Body::Optional(name) if self.custom => of(&CUSTOM_TYPES, name),
            Body::Object(name) | Body::Optional(name) => of(&["*/*"], name),
            Body::Patch if self.custom => of(&PATCH_TYPES[..3], PATCH),
            Body::Patch => of(&PATCH_TYPES, PATCH),
        };
        if !matches!(self.body, Body::Optional(_)) {
            body["required"] = json!(true);
        }
        body
    }
}

fn body_parameter(name: &str, required: bool) -> Value {
    let mut out = json!({"in": "body", "name": "body", "schema": Flavor::V2.reference(name)});
    if required {
        out["required"] = json!(true);
    }
    out
}

fn parameter(place: &str, name: &str, kind: &str, about: &str, flavor: Flavor) -> Value {
    let mut out = json!({"description": about, "in": place, "name": name});
    if place == "path" {
        out["required"] = json!(true);
    }
    match flavor {
        Flavor::V2 => {
            out["type"] = json!(kind);
            out["uniqueItems"] = json!(true);
        }
        Flavor::V3 => out["schema"] = json!({"type": kind, "uniqueItems": true}),
    }
    out
}

/// The operations of one path, with the parameters that its pattern names.
pub fn path_item(operations: &[Operation<'_>], path: &str, flavor: Flavor) -> Value {
    let (first, others) = operations.split_first().map_or((None, operations), |(first, others)| (Some(first), others));
    let in_all = |parameter: &&Parameter| others.iter().all(|operation| operation.parameters.contains(parameter));
    let common: Vec<Parameter> = first.iter().flat_map(|o| o.parameters.iter().filter(in_all)).copied().collect();
    let mut item = Map::new();
    for operation in operations {
        item.insert(operation.method.to_owned(), operation.render(&common, flavor));
    }
    let query = common.iter().map(|(name, kind, about)| (*name, parameter("query", name, kind, about, flavor)));
    let mut shared: Vec<(&str, Value)> = query.collect();
    for (name, about) in
        [("name", "name of the object"), ("namespace", "the namespace of the object"), ("path", "the rest of the URL")]
    {
        if path.contains(&format!("{{{name}}}")) {
            shared.push((name, parameter("path", name, "string", about, flavor)));
        }
    }
    // What is part of the path comes before a query parameter of the same name.
    shared.sort_by_key(|(name, parameter)| (*name, parameter["in"] == "query"));
    if !shared.is_empty() {
        item.insert("parameters".into(), shared.into_iter().map(|(_, parameter)| parameter).collect());
    }
    Value::Object(item)
}
