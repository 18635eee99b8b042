//! Requests on resources: from the request info to the verb, and back to a response.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::codec;
use apimachinery::meta::{FieldSelector, LabelSelector};
use apimachinery::status::{Result, Status};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use serde_json::{Value, json};

use super::negotiate::{self, Format, Shape};
use super::render::{self, Renderer};
use super::table::IncludeObject;
use super::{RequestInfo, Response, options, other_kind::other_kind, watch};
use crate::admission::{Operation, Warnings};
use crate::auth::UserInfo;
use crate::cache::{ConvertedFields, Selection, Start, WatchError};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{ScalePaths, ScaleSelector, Subresource};
use crate::registry::{SchemaRef, Served, ServedSubresource};
use crate::server::Server;
use crate::verbs::patch::{Patch, check_strict};
use crate::verbs::{self, Call, FieldValidation, Written};

/// A request with its body read.
pub struct Input<'a> {
    pub server: &'a Arc<Server>,
    pub user: &'a UserInfo,
    pub info: &'a RequestInfo,
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
    pub body: Bytes,
    /// What admission wants the client to know, also when the request fails.
    pub warnings: Arc<Warnings>,
}

/// What a body says that it is.
#[derive(Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Claim {
    kind: String,
    api_version: String,
}

/// The answer, and texts for `Warning` headers.
pub struct Output {
    pub response: Response,
    pub warnings: Vec<String>,
}

impl From<Response> for Output {
    fn from(response: Response) -> Self {
        Self { response, warnings: vec![] }
    }
}

/// Answers a resource request; the caller makes errors into responses.
pub async fn serve(input: &Input<'_>) -> Result<Output> {
    let info = input.info;
    let Some(resource) = input.server.registry.get(&info.api_group, &info.resource) else {
        return unknown_resource(input);
    };
    let served = resource.version(&info.api_version).ok_or_else(Status::path_not_found)?.clone();
    let subresource = match info.subresource.as_str() {
        "" => None,
        name => {
            Some(served.subresources.iter().find(|sub| sub.name == name).cloned().ok_or_else(Status::path_not_found)?)
        }
    };
    let spans_namespaces = matches!(info.verb.as_str(), "list" | "watch" | "deletecollection");
    if resource.namespaced && info.namespace.is_empty() && !spans_namespaces {
        return Err(if info.name.is_empty() { method_not_allowed() } else { Status::path_not_found() });
    }
    if !resource.namespaced && !info.namespace.is_empty() && info.resource != "namespaces" {
        return Err(Status::path_not_found());
    }
    check_verb(input, &served, subresource.as_ref())?;
    if let Some(text) = resource.strategy.deprecation() {
        input.warnings.add(text);
    }
    let format = negotiate::accept(input.headers, !resource.custom)?;
    let include = IncludeObject::parse(info.param("includeObject"))
        .ok_or_else(|| Status::bad_request("unrecognized includeObject value"))?;
    let call = Call {
        namespace: if resource.namespaced { info.namespace.clone() } else { String::new() },
        name: info.name.clone(),
        subresource: info.subresource.clone(),
        options: options::of_write(input)?,
        warnings: input.warnings.clone(),
        ..Call::new(input.server, input.user, resource.clone(), served.clone())
    };
    let request = Request {
        input,
        renderer: Renderer { resource, served, format, include, gzip: super::compress::is_wanted(input.headers) },
        call,
    };
    match subresource {
        Some(sub) => request.subresource(&sub).await,
        None => request.resource().await,
    }
}

/// What upstream's server of custom resources says of one that it does not know is not even JSON.
fn unknown_resource(input: &Input<'_>) -> Result<Output> {
    if !input.server.registry.has_custom_group(&input.info.api_group) {
        return Err(Status::path_not_found());
    }
    let mut response = Response::new(super::full("404 page not found\n"));
    *response.status_mut() = StatusCode::NOT_FOUND;
    let text = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    Ok(response.into())
}

fn check_verb(input: &Input<'_>, served: &Served, subresource: Option<&ServedSubresource>) -> Result<()> {
    let info = input.info;
    let verbs = subresource.map_or(&served.verbs, |sub| &sub.verbs);
    let known = verbs.contains(&info.verb);
    let is_item = !info.name.is_empty();
    // Objects are created in their collection, and changed at their own path.
    let misplaced = match info.verb.as_str() {
        "create" => is_item && subresource.is_none(),
        "update" | "patch" => !is_item,
        _ => input.method == Method::HEAD,
    };
    // Reading one object by a field selector is a list of it.
    if !misplaced && (known || (info.verb == "list" && verbs.iter().any(|verb| verb == "list"))) {
        return Ok(());
    }
    Err(method_not_allowed())
}

pub fn method_not_allowed() -> Status {
    let message = "the server does not allow this method on the requested resource";
    let mut status = Status::failure(405, "MethodNotAllowed", message);
    status.details = Some(Box::default());
    status
}

struct Request<'a> {
    input: &'a Input<'a>,
    renderer: Renderer,
    call: Call<'a>,
}

impl Request<'_> {
    async fn resource(&self) -> Result<Output> {
        let info = self.input.info;
        if let Some(handler) = self.call.resource.strategy.answers_read() {
            let mut answer = handler.handle(&self.call.cx(), &info.name, "list", Value::Null).await?;
            let items = answer.get_mut("items").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default();
            if info.verb == "list" {
                return Ok(self.renderer.value_list(&json!({}), items)?.into());
            }
            let found = items.into_iter().find(|object| object.name() == info.name);
            let found = found.ok_or_else(|| Status::not_found(&info.group_resource(), &info.name))?;
            return Ok(self.renderer.object(found, StatusCode::OK)?.into());
        }
        match info.verb.as_str() {
            "get" => {
                let object = verbs::get::get(&self.call, info.param("resourceVersion")).await?;
                Ok(self.renderer.stored(&object)?.into())
            }
            "list" => self.list().await,
            "watch" => self.watch().await,
            "create" => {
                let is_answer_only = self.call.resource.strategy.answers_create().is_some();
                if is_answer_only && self.renderer.format.shape != Shape::Object {
                    return Err(Status::not_acceptable(&[
                        "application/json",
                        "application/yaml",
                        "application/vnd.kubernetes.protobuf",
                    ]));
                }
                let mut warnings = Vec::new();
                let body = self.decode(self.call.served.schema.as_ref(), &mut warnings)?;
                self.check_type(&body)?;
                let written = verbs::create::create(&self.call, body).await;
                self.written(written, warnings)
            }
            "update" => {
                let mut warnings = Vec::new();
                let body = self.decode(self.call.served.schema.as_ref(), &mut warnings)?;
                self.check_type(&body)?;
                let written = verbs::update::update(&self.call, body).await;
                self.written(written, warnings)
            }
            "patch" => {
                let mut warnings = Vec::new();
                let patch = self.patch_body(&mut warnings)?;
                let written = verbs::patch::patch(&self.call, &patch).await;
                self.written(written, warnings)
            }
            "delete" => self.delete().await,
            "deletecollection" => self.delete_collection().await,
            _ => Err(Status::path_not_found()),
        }
    }

    async fn subresource(&self, sub: &ServedSubresource) -> Result<Output> {
        let kind = self.call.resource.strategy.subresource(&sub.name).ok_or_else(Status::path_not_found)?;
        match (kind, self.input.info.verb.as_str()) {
            (Subresource::Update(_), _) => self.resource().await,
            (Subresource::CustomScale(custom), verb) => {
                let spec: Vec<&str> = custom.spec_replicas.iter().map(String::as_str).collect();
                let status: Vec<&str> = custom.status_replicas.iter().map(String::as_str).collect();
                let selector: Vec<&str> = custom.selector.iter().map(String::as_str).collect();
                let selector = ScaleSelector::Text(&selector);
                self.scale(sub, &ScalePaths { spec_replicas: &spec, status_replicas: &status, selector }, verb).await
            }
            (Subresource::Scale(paths), verb) => self.scale(sub, &paths, verb).await,
            (Subresource::Custom(handler), verb) => {
                let mut body = match verb {
                    "create" | "update" => self.decode_as(sub)?,
                    _ => Value::Null,
                };
                if verb == "create" {
                    self.call.admit(Operation::Create, &self.call.name, &mut body, None).await?;
                    self.call.validate_admission(Operation::Create, &self.call.name, &mut body, None).await?;
                    self.call.manage_answer(&sub.gvk, &mut body);
                }
                let answer = handler.handle(&self.call.cx(), &self.call.name, verb, body).await?;
                let code = if verb == "create" { StatusCode::CREATED } else { StatusCode::OK };
                self.respond(&answer, code)
            }
        }
    }

    async fn scale(&self, sub: &ServedSubresource, paths: &ScalePaths<'_>, verb: &str) -> Result<Output> {
        let written = match verb {
            "get" => {
                let object = verbs::get::get(&self.call, self.input.info.param("resourceVersion")).await?;
                return self.respond(&verbs::scale::of(&object.value(), paths), StatusCode::OK);
            }
            "update" => {
                let scale = self.decode_as(sub)?;
                verbs::scale::change(&self.call, paths, &mut |_| Ok(scale.clone())).await?
            }
            "patch" => match self.patch_body(&mut Vec::new())? {
                Patch::Apply(config) => verbs::scale::apply(&self.call, paths, &config).await?,
                patch => verbs::scale::change(&self.call, paths, &mut |scale| patch_scale(scale, &patch)).await?,
            },
            _ => return Err(method_not_allowed()),
        };
        self.respond(&written.object, StatusCode::OK)
    }

    async fn list(&self) -> Result<Output> {
        let info = self.input.info;
        options::check_list(info)?;
        let options = verbs::list::ListOptions {
            selection: self.selection()?,
            resource_version: info.param("resourceVersion").map(str::to_owned),
            resource_version_match: info.param("resourceVersionMatch").unwrap_or_default().to_owned(),
            limit: self.limit()?,
            continue_token: info.param("continue").unwrap_or_default().to_owned(),
        };
        let list = verbs::list::list(&self.call, &options).await?;
        Ok(self.renderer.list(list)?.into())
    }

    async fn watch(&self) -> Result<Output> {
        let info = self.input.info;
        let selection = self.selection()?;
        let bookmarks = info.flag("allowWatchBookmarks");
        options::check_list(info)?;
        let wants_initial = info.param("sendInitialEvents").map(|_| info.flag("sendInitialEvents"));
        let version = info.param("resourceVersion");
        let revision = verbs::get::parse_version(version)?;
        let start = match (wants_initial, revision) {
            (Some(true), _) | (None, None | Some(0)) => Start::Snapshot,
            (Some(false), None | Some(0)) => Start::Now,
            (_, Some(revision)) => Start::After(revision),
        };
        if start == Start::Snapshot || start == Start::Now {
            verbs::get::be_fresh(&self.call, version).await?;
        }
        let options = watch::Options {
            bookmarks,
            mark_initial_end: wants_initial == Some(true) && bookmarks,
            timeout: self.watch_timeout()?,
            shutdown: self.input.server.shutdown.clone(),
        };
        match self.call.resource.cache.watch(selection, start) {
            Ok((watch, initial)) => {
                watch.selection.prepare(initial.iter().flat_map(|snapshot| snapshot.objects.values()))?;
                Ok(watch::respond(self.renderer.clone(), watch, initial, options).into())
            }
            Err(error @ WatchError::TooOld { .. }) => {
                Ok(watch::respond_error(&self.renderer, &Status::expired(error.to_string())).into())
            }
            Err(WatchError::NotReady) => Err(Status::too_many_requests("storage is (re)initializing", 1)),
        }
    }

    fn watch_timeout(&self) -> Result<Duration> {
        let asked = options::number(self.input.info, "timeoutSeconds")?.and_then(|seconds| u64::try_from(seconds).ok());
        Ok(match asked.filter(|seconds| *seconds > 0) {
            None => watch::default_timeout(self.input.server.config.min_request_timeout),
            Some(seconds) => Duration::from_secs(seconds.min(365 * 86_400)),
        })
    }

    /// How long pages are; a limit that is negative is none.
    fn limit(&self) -> Result<usize> {
        let limit = options::number(self.input.info, "limit")?;
        Ok(limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0))
    }

    async fn delete(&self) -> Result<Output> {
        let options = self.delete_options()?;
        let mut call_options = self.call.options.clone();
        call_options.dry_run = options.dry_run;
        let call = Call { options: call_options, ..self.call_again() };
        let deleted = verbs::delete::delete(&call, &options).await?;
        let answer = verbs::delete::answer(&call, &deleted)?;
        if answer.kind() == "Status" {
            return self.respond(&answer, StatusCode::OK);
        }
        Ok(self.renderer.object(answer, StatusCode::OK)?.into())
    }

    async fn delete_collection(&self) -> Result<Output> {
        let options = self.delete_options()?;
        options::check_list(self.input.info)?;
        let list_options = verbs::list::ListOptions {
            selection: self.selection()?,
            resource_version: None,
            limit: self.limit()?,
            continue_token: self.input.info.param("continue").unwrap_or_default().to_owned(),
            ..Default::default()
        };
        let list = verbs::list::list(&self.call, &list_options).await?;
        let mut call_options = self.call.options.clone();
        call_options.dry_run = options.dry_run;
        let call = Call { options: call_options, ..self.call_again() };
        let deleted = verbs::delete::delete_collection(&call, &list.items, &options).await?;
        let items = self.call.resource.present_all(&self.call.served, deleted)?;
        let mut metadata = json!({"resourceVersion": list.revision.to_string()});
        if !list.continue_token.is_empty() || self.call.resource.custom {
            metadata["continue"] = list.continue_token.into();
        }
        if let Some(remaining) = list.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        Ok(self.renderer.value_list(&metadata, items)?.into())
    }

    fn call_again(&self) -> Call<'_> {
        Call {
            namespace: self.call.namespace.clone(),
            name: self.call.name.clone(),
            subresource: self.call.subresource.clone(),
            warnings: self.call.warnings.clone(),
            ..Call::new(self.call.server, self.call.user, self.call.resource.clone(), self.call.served.clone())
        }
    }

    fn delete_options(&self) -> Result<crate::registry::strategy::DeleteOptions> {
        let body = if self.input.body.is_empty() {
            Value::Null
        } else {
            negotiate::decode(self.input.headers, &self.input.body, None)?.value
        };
        verbs::delete::options(&body, |name| self.input.info.param(name).filter(|v| !v.is_empty()).map(str::to_owned))
    }

    fn selection(&self) -> Result<Selection> {
        let info = self.input.info;
        let labels = match info.label_selector.as_str() {
            "" => None,
            text => Some(LabelSelector::parse(text).map_err(|error| Status::bad_request(error.to_string()))?),
        };
        let mut fields = match info.field_selector.as_str() {
            "" => None,
            text => Some(FieldSelector::parse(text).map_err(|error| Status::bad_request(error.to_string()))?),
        };
        let resource = &self.call.resource;
        for requirement in fields.iter_mut().flat_map(FieldSelector::requirements_mut) {
            let field = requirement.field.as_str();
            let own_labels = !resource.strategy.selectable_fields().is_empty();
            if field == "metadata.name" || field == "metadata.namespace" && (resource.namespaced || !own_labels) {
                continue;
            }
            let is_selectable = |stored: &&str| match &self.call.served.fields {
                Some(fields) => fields.iter().any(|name| name == *stored),
                None => resource.cache.kind().fields.iter().any(|(name, _)| name == *stored),
            };
            let Some(stored) = resource.strategy.stored_field(field).filter(is_selectable) else {
                return Err(unknown_field(resource, field));
            };
            requirement.field = stored.to_owned();
        }
        let mut fields = fields.filter(|fields| !fields.requirements().is_empty());
        let converted = match resource.cache.kind().converted {
            true => fields.take().map(|fields| {
                let (resource, version) = (resource.clone(), self.call.served.gvk.version.clone());
                ConvertedFields::new(fields, move |objects| resource.strategy.all_from_storage(&version, objects))
            }),
            false => None,
        };
        let namespaced = self.call.resource.namespaced;
        let namespace = match self.call.namespace.as_str() {
            "" if namespaced || self.call.name.is_empty() => None,
            namespace => Some(namespace.to_owned()),
        };
        let name = Some(self.call.name.clone()).filter(|name| !name.is_empty());
        Ok(Selection { namespace, name, labels, fields, converted })
    }

    /// The body as an object of `schema`; complaints about fields are errors or warnings, as the client chose.
    fn decode(&self, schema: Option<&SchemaRef>, warnings: &mut Vec<String>) -> Result<Value> {
        let body = negotiate::decode(self.input.headers, &self.input.body, schema);
        let body = body.map_err(|status| self.cannot_be_handled(status))?;
        check_strict(self.call.options.field_validation, &body.strict_errors, warnings)
            .map_err(|status| self.cannot_be_handled(status))?;
        if !body.value.is_object() {
            return Err(Status::bad_request("the request body is not an object"));
        }
        Ok(body.value)
    }

    /// Says what the body claimed to be and what was wanted, before what is wrong with it.
    fn cannot_be_handled(&self, status: Status) -> Status {
        if status.reason != "BadRequest" {
            return status;
        }
        let wanted = &self.call.served.gvk;
        // YAML: its reader has said enough, and what it claims is what is wanted, nearly always.
        let claimed = serde_json::from_slice::<Claim>(&self.input.body).unwrap_or_default();
        let kind = if claimed.kind.is_empty() { &*wanted.kind } else { &claimed.kind };
        let version = match apimachinery::meta::GroupVersion::parse(&claimed.api_version) {
            Some(given) if !given.version.is_empty() => given.version.to_string(),
            _ => wanted.version.to_string(),
        };
        let why = status.message;
        Status::bad_request(format!("{kind} in version {version:?} cannot be handled as a {}: {why}", wanted.kind))
    }

    /// The body as what a subresource takes.
    fn decode_as(&self, sub: &ServedSubresource) -> Result<Value> {
        let schema = apimachinery::schema::builtin().kind(&sub.gvk).map(SchemaRef::Builtin);
        if self.input.body.is_empty() {
            return Ok(json!({"kind": sub.gvk.kind, "apiVersion": sub.gvk.api_version(), "metadata": {}}));
        }
        self.decode(schema.as_ref(), &mut Vec::new())
    }

    /// The object says what it is, and it is what the URL is about.
    fn check_type(&self, object: &Value) -> Result<()> {
        let gvk = &self.call.served.gvk;
        let (kind, api_version) = (object.kind(), object.api_version());
        if self.call.resource.custom && (kind.is_empty() || api_version.is_empty()) {
            return Err(self.unrecognized(if kind.is_empty() { "Kind" } else { "apiVersion" }));
        }
        if (kind.is_empty() || kind == gvk.kind) && (api_version.is_empty() || api_version == gvk.api_version()) {
            return Ok(());
        }
        Err(other_kind(kind, api_version, gvk))
    }

    /// Custom resources must say what they are.
    fn unrecognized(&self, missing: &str) -> Status {
        const SHOWN: usize = 30;
        let body = String::from_utf8_lossy(&self.input.body);
        let start: String = body.chars().take(SHOWN).collect();
        let more = if start.len() < body.len() { " ..." } else { "" };
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): Object '{missing}' is missing in '{body}' ({start}{more})",
            self.call.served.gvk.kind
        ))
    }

    fn patch_body(&self, warnings: &mut Vec<String>) -> Result<Patch> {
        let content_type =
            self.input.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let json = || {
            serde_json::from_slice::<Value>(&self.input.body).map_err(|error| Status::bad_request(error.to_string()))
        };
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Ok(Patch::Json(self.input.body.clone())),
            "application/merge-patch+json" => Ok(Patch::Merge(json()?)),
            "application/strategic-merge-patch+json" if self.call.resource.custom => {
                Err(verbs::patch::unsupported_strategic())
            }
            "application/strategic-merge-patch+json" => Ok(Patch::Strategic(json()?)),
            "application/apply-patch+yaml" => {
                let unreadable =
                    |error: codec::DecodeError| Status::bad_request(format!("error decoding YAML: {error}"));
                let config = codec::yaml::parse(&self.input.body).map_err(unreadable)?;
                // Unknown fields have no owner: the apply itself refuses them. Duplicates are the text's own fault.
                let duplicate = (!config.strict_errors.is_empty())
                    .then(|| codec::yaml::first_duplicate(&self.input.body))
                    .flatten()
                    .map(|what| format!("yaml: unmarshal errors:\n  {what}"));
                match (duplicate, self.call.options.field_validation) {
                    (Some(what), FieldValidation::Strict) => {
                        return Err(Status::bad_request(format!(
                            "error decoding YAML: error converting YAML to JSON: {what}"
                        )));
                    }
                    (Some(what), FieldValidation::Warn) => warnings.push(what.replace('\n', " ")),
                    _ => {}
                }
                Ok(Patch::Apply(config.value))
            }
            _ => {
                let mut status = Status::failure(415, "UnsupportedMediaType", "415: Unsupported Media Type");
                status.details = Some(Box::default());
                Err(status)
            }
        }
    }

    /// The answer to a write. What was odd about the body is said also when the write fails.
    fn written(&self, written: Result<Written>, mut warnings: Vec<String>) -> Result<Output> {
        let written = written.inspect_err(|_| warnings.iter().for_each(|text| self.call.warnings.add(text)))?;
        warnings.extend(written.warnings);
        let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
        let response = self.renderer.written(written.object, written.text, code)?;
        Ok(Output { response, warnings })
    }

    fn respond(&self, value: &Value, code: StatusCode) -> Result<Output> {
        Ok(render::respond(self.renderer.format.encoding, value, code)?.into())
    }
}

fn patch_scale(mut scale: Value, patch: &Patch) -> Result<Value> {
    match patch {
        Patch::Json(operations) => apimachinery::merge::json_patch(&mut scale, operations)
            .map_err(|error| Status::failure(422, "Invalid", error.to_string()))?,
        Patch::Merge(change) | Patch::Strategic(change) | Patch::Apply(change) => {
            apimachinery::merge::merge_patch(&mut scale, change);
        }
    }
    Ok(scale)
}

/// Kinds without selectable fields of their own name the two that all have.
fn unknown_field(resource: &crate::registry::Resource, field: &str) -> Status {
    Status::bad_request(if resource.custom || !resource.strategy.selectable_fields().is_empty() {
        format!("field label not supported: {field}")
    } else {
        format!("{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")
    })
}

/// The format of an error's answer: what was asked for, as far as errors have it.
pub fn error_encoding(headers: &HeaderMap) -> negotiate::Encoding {
    negotiate::accept(headers, true)
        .map(|Format { encoding, shape: Shape::Object | Shape::Table(_) | Shape::Metadata(_) }| encoding)
        .unwrap_or_default()
}
