//! Which paths the resources of a group and version have, and what can be done there.

use super::custom;
use super::definitions::published;
use super::operations::{Body, Operation, Parameter};
use super::root_of;
use crate::meta::GroupVersion;
use crate::schema::{ResourceFacts, SubresourceFacts, builtin};

const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";

const WATCH_EVENT: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.WatchEvent";

const PRETTY: Parameter = ("pretty", "string", "If 'true', the answer is indented.");
const WRITE: [Parameter; 3] = [
    ("dryRun", "string", "Run all stages but do not persist; the only valid value is All."),
    ("fieldManager", "string", "The name of the actor that makes the change; required for apply."),
    ("fieldValidation", "string", "How to treat unknown and duplicate fields: Ignore, Warn (the default) or Strict."),
];
const FORCE: Parameter = ("force", "boolean", "Take fields over from other managers; for apply only.");
const LIST: [Parameter; 11] = [
    ("allowWatchBookmarks", "boolean", "Send bookmarks in a watch."),
    ("continue", "string", "Where to go on, from the previous chunk of the list."),
    ("fieldSelector", "string", "Restrict the list by fields."),
    ("labelSelector", "string", "Restrict the list by labels."),
    ("limit", "integer", "The size of a chunk."),
    ("resourceVersion", "string", "How old the data may be."),
    ("resourceVersionMatch", "string", "How resourceVersion is meant: Exact or NotOlderThan."),
    ("sendInitialEvents", "boolean", "Begin a watch with the current objects and a bookmark."),
    ("shardSelector", "string", "Restrict the list to a shard."),
    ("timeoutSeconds", "integer", "How long the call may take."),
    ("watch", "boolean", "Stream changes instead of listing."),
];
const DELETE: [Parameter; 5] = [
    ("dryRun", "string", "Run all stages but do not persist; the only valid value is All."),
    ("gracePeriodSeconds", "integer", "How long the object may take to go; 0 means at once."),
    ("ignoreStoreReadErrorWithClusterBreakingPotential", "boolean", "Delete even what cannot be read any more."),
    ("orphanDependents", "boolean", "Deprecated: use propagationPolicy."),
    ("propagationPolicy", "string", "What happens to dependents: Orphan, Background or Foreground."),
];
const LOG: [Parameter; 9] = [
    ("container", "string", "Whose log; needed where the pod has more than one container."),
    ("follow", "boolean", "Go on as the log grows."),
    ("insecureSkipTLSVerifyBackend", "boolean", "Do not check the certificate of the node."),
    ("limitBytes", "integer", "How many bytes to answer at most."),
    ("previous", "boolean", "The log of the container's last run before this one."),
    ("sinceSeconds", "integer", "From how many seconds ago on."),
    ("stream", "string", "All, Stdout or Stderr."),
    ("tailLines", "integer", "How many lines from the end."),
    ("timestamps", "boolean", "Begin each line with its time."),
];
const STREAMS: [Parameter; 4] = [
    ("stderr", "boolean", "Send what goes to standard error."),
    ("stdin", "boolean", "Take standard input."),
    ("stdout", "boolean", "Send what goes to standard output."),
    ("tty", "boolean", "Give the process a terminal."),
];
const CONTAINER: Parameter = ("container", "string", "Which container; the first one without it.");
const COMMAND: Parameter = ("command", "string", "What to run, word by word; not run in a shell.");
const PORTS: Parameter = ("ports", "integer", "The ports to forward, for WebSocket clients.");
const PROXY_PATH: Parameter = ("path", "string", "The rest of the URL.");

/// The paths in order, each with its operations.
pub fn of<'r>(gv: &GroupVersion, resources: &[&'r ResourceFacts<'r>]) -> Vec<(String, Vec<Operation<'r>>)> {
    let root = format!("/{}", root_of(gv));
    let mut paths = Vec::new();
    paths.push((format!("{root}/"), vec![discovery(gv)]));
    for resource in resources {
        resource_paths(&Names::new(gv, resource), resource, &root, &mut paths);
    }
    paths.retain(|(_, operations)| !operations.is_empty());
    paths.sort_by(|a, b| a.0.cmp(&b.0));
    paths
}

/// What the group and version has.
fn discovery<'r>(gv: &GroupVersion) -> Operation<'r> {
    let names = Names::of(gv, "");
    Operation {
        method: "get",
        action: "",
        id: format!("get{}APIResources", names.group_version),
        tag: names.tag,
        summary: "get available resources".into(),
        parameters: Vec::new(),
        body: Body::None,
        answer: Some("io.k8s.apimachinery.pkg.apis.meta.v1.APIResourceList".into()),
        kind: None,
        custom: custom::is_custom_group(&gv.group),
    }
}

/// What operation ids are made of.
struct Names {
    /// `AppsV1`
    group_version: String,
    /// `apps_v1`
    tag: String,
    /// `Namespaced` or nothing.
    scope: &'static str,
}

impl Names {
    fn new(gv: &GroupVersion, resource: &ResourceFacts<'_>) -> Self {
        Self::of(gv, if resource.namespaced { "Namespaced" } else { "" })
    }

    fn of(gv: &GroupVersion, scope: &'static str) -> Self {
        let group = gv.group.strip_suffix(".k8s.io").unwrap_or(&gv.group);
        let group = if group.is_empty() { "core" } else { group };
        let camel: String = group.split('.').map(capitalized).collect();
        Self {
            group_version: format!("{camel}{}", capitalized(&gv.version)),
            tag: format!("{}_{}", camel[..1].to_lowercase() + &camel[1..], gv.version),
            scope,
        }
    }
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// Of a kind that is not built in, the definition has the kind's own name.
fn definition_of(group: &str, version: &str, kind: &str) -> Option<String> {
    match builtin().kind_index(group, version, kind) {
        Some(index) => Some(published(builtin().definitions()[usize::from(index)].name)),
        None => custom::is_custom_group(group).then(|| custom::definition_name(group, version, kind)),
    }
}

fn resource_paths<'r>(
    names: &Names,
    r: &'r ResourceFacts<'r>,
    root: &str,
    paths: &mut Vec<(String, Vec<Operation<'r>>)>,
) {
    let plural = r.resource;
    let collection =
        if r.namespaced { format!("{root}/namespaces/{{namespace}}/{plural}") } else { format!("{root}/{plural}") };
    // Namespaces are also the parents of namespaced paths, which makes no difference for their own.
    let item = format!("{collection}/{{name}}");
    let make = Maker { names, resource: r, object: definition_of(r.group, r.version, r.kind) };
    paths.push((collection, make.collection()));
    paths.push((item.clone(), make.item()));
    if r.verbs.contains(&"watch") {
        watch_paths(&make, root, paths);
    }
    if r.namespaced {
        let everywhere = r.verbs.contains(&"list").then(|| make.list("ForAllNamespaces", ""));
        paths.push((format!("{root}/{plural}"), everywhere.into_iter().collect()));
    }
    for sub in &r.subresources {
        let path = format!("{item}/{}", sub.name);
        if sub.name == "proxy" {
            paths.push((format!("{path}/{{path}}"), make.connect(sub, "WithPath")));
        }
        paths.push((path, if is_connect(sub) { make.connect(sub, "") } else { make.subresource(sub) }));
    }
}

/// The deprecated paths that only watch.
fn watch_paths<'r>(make: &Maker<'_, 'r>, root: &str, paths: &mut Vec<(String, Vec<Operation<'r>>)>) {
    let r = make.resource;
    let namespaced = if r.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{root}/watch{namespaced}/{}", r.resource);
    paths.push((format!("{collection}/{{name}}"), vec![make.watch("watch", make.names.scope, "")]));
    paths.push((collection, vec![make.watch("watchlist", make.names.scope, "List")]));
    if r.namespaced {
        let everywhere = make.watch("watchlist", "", "ListForAllNamespaces");
        paths.push((format!("{root}/watch/{}", r.resource), vec![everywhere]));
    }
}

/// Whether a deletion answers with the deleted object instead of a `Status`.
fn answers_with_object(r: &ResourceFacts<'_>) -> bool {
    const CORE: [&str; 7] = [
        "persistentvolumeclaims",
        "persistentvolumes",
        "pods",
        "podtemplates",
        "resourcequotas",
        "serviceaccounts",
        "services",
    ];
    match r.group {
        "" => CORE.contains(&r.resource),
        "resource.k8s.io" => true,
        "storage.k8s.io" => matches!(
            r.resource,
            "csidrivers" | "csinodes" | "storageclasses" | "volumeattachments" | "volumeattributesclasses"
        ),
        _ => false,
    }
}

/// Whether the subresource is a stream to somewhere else.
fn is_connect(sub: &SubresourceFacts<'_>) -> bool {
    sub.kind.ends_with("Options")
}

struct Maker<'a, 'r> {
    names: &'a Names,
    resource: &'r ResourceFacts<'r>,
    object: Option<String>,
}

impl<'r> Maker<'_, 'r> {
    fn operation(&self, method: &'static str, action: &'static str, verb: &str, suffix: &str) -> Operation<'r> {
        let r = self.resource;
        let scope = self.names.scope;
        Operation {
            method,
            action,
            id: format!("{verb}{}{scope}{}{suffix}", self.names.group_version, r.kind),
            tag: self.names.tag.clone(),
            summary: summary(action, r.kind, ""),
            parameters: vec![PRETTY],
            body: Body::None,
            answer: self.object.clone(),
            kind: Some((r.group, r.version, r.kind)),
            custom: super::custom::is_custom_group(r.group),
        }
    }

    fn has(&self, verb: &str) -> bool {
        self.resource.verbs.contains(&verb)
    }

    fn list_kind(&self) -> String {
        format!("{}List", self.resource.kind)
    }

    fn body(&self) -> Body {
        self.object.clone().map_or(Body::None, Body::Object)
    }

    fn list(&self, suffix: &str, scope: &str) -> Operation<'r> {
        let r = self.resource;
        let mut list = self.operation("get", "list", "list", suffix);
        list.id = format!("list{}{scope}{}{suffix}", self.names.group_version, r.kind);
        list.parameters = sorted(&LIST, &[PRETTY]);
        list.answer = definition_of(r.group, r.version, &self.list_kind());
        list
    }

    fn watch(&self, action: &'static str, scope: &str, suffix: &str) -> Operation<'r> {
        let mut watch = self.operation("get", action, "watch", suffix);
        watch.id = format!("watch{}{scope}{}{suffix}", self.names.group_version, self.resource.kind);
        watch.parameters = sorted(&LIST, &[PRETTY]);
        watch.answer = Some(WATCH_EVENT.into());
        watch
    }

    fn collection(&self) -> Vec<Operation<'r>> {
        let mut out = Vec::new();
        if self.has("list") {
            out.push(self.list("", self.names.scope));
        }
        if self.has("create") {
            let parameters = sorted(&WRITE, &[PRETTY]);
            out.push(Operation { parameters, body: self.body(), ..self.operation("post", "post", "create", "") });
        }
        if self.has("deletecollection") {
            let mut delete = self.operation("delete", "deletecollection", "delete", "");
            let scope = self.names.scope;
            delete.id = format!("delete{}Collection{scope}{}", self.names.group_version, self.resource.kind);
            let of_list = LIST.iter().filter(|(name, ..)| !matches!(*name, "allowWatchBookmarks" | "watch"));
            delete.parameters = sorted(&DELETE, &of_list.copied().chain([PRETTY]).collect::<Vec<_>>());
            delete.body = Body::Optional(DELETE_OPTIONS.into());
            if delete.custom {
                delete.parameters = LIST.to_vec();
                delete.body = Body::None;
            }
            delete.answer = Some(STATUS.into());
            out.push(delete);
        }
        out
    }

    fn item(&self) -> Vec<Operation<'r>> {
        let mut out = self.object_operations("", &self.resource.verbs);
        if self.has("delete") {
            let mut delete = self.operation("delete", "delete", "delete", "");
            delete.parameters = sorted(&DELETE, &[PRETTY]);
            delete.body = Body::Optional(DELETE_OPTIONS.into());
            if !answers_with_object(self.resource) {
                delete.answer = Some(STATUS.into());
            }
            out.push(delete);
        }
        out
    }

    /// Reading, replacing and patching an object or a part of it.
    fn object_operations(&self, suffix: &str, verbs: &[&str]) -> Vec<Operation<'r>> {
        let mut out = Vec::new();
        if verbs.contains(&"get") {
            let mut read = self.operation("get", "get", "read", suffix);
            if read.custom {
                read.parameters = LIST.iter().filter(|(name, ..)| *name == "resourceVersion").copied().collect();
            }
            out.push(read);
        }
        if verbs.contains(&"update") {
            let replace = self.operation("put", "put", "replace", suffix);
            out.push(Operation { parameters: sorted(&WRITE, &[PRETTY]), body: self.body(), ..replace });
        }
        if verbs.contains(&"patch") {
            let parameters = sorted(&WRITE, &[FORCE, PRETTY]);
            out.push(Operation { parameters, body: Body::Patch, ..self.operation("patch", "patch", "patch", suffix) });
        }
        out
    }

    fn subresource(&self, sub: &'r SubresourceFacts<'r>) -> Vec<Operation<'r>> {
        let suffix = camel(sub.name);
        let object = definition_of(sub.group, sub.version, sub.kind);
        let inner = Maker { names: self.names, resource: self.resource, object };
        let mut out = inner.object_operations(&suffix, &sub.verbs);
        if sub.verbs.contains(&"create") {
            let create = inner.operation("post", "post", "create", &suffix);
            out.push(Operation { parameters: sorted(&WRITE, &[PRETTY]), body: inner.body(), ..create });
        }
        for operation in &mut out {
            // Upstream says of the scale of a custom resource that it is about the resource.
            if !operation.custom {
                operation.kind = Some((sub.group, sub.version, sub.kind));
            }
            operation.summary = summary(operation.action, self.resource.kind, sub.name);
            if sub.name == "log" {
                operation.answer = None;
                operation.parameters = sorted(&LOG, &[PRETTY]);
            }
        }
        out
    }

    fn connect(&self, sub: &'r SubresourceFacts<'r>, with_path: &str) -> Vec<Operation<'r>> {
        // A proxy passes on every method, whatever discovery says.
        let methods: &[&str] = match sub.name {
            "proxy" => &["delete", "get", "head", "options", "patch", "post", "put"],
            _ => &["get", "post"],
        };
        let connect = |method: &&'static str| {
            let suffix = format!("{}{with_path}", camel(sub.name));
            let mut out = self.operation(method, "connect", "connect", &suffix);
            let kind = self.resource.kind;
            let (gv, scope) = (&self.names.group_version, self.names.scope);
            out.id = format!("connect{gv}{}{scope}{kind}{suffix}", capitalized(method));
            out.summary = format!("connect {} requests to {} of {kind}", method.to_uppercase(), sub.name);
            out.parameters = match sub.name {
                "attach" => sorted(&STREAMS, &[CONTAINER]),
                "exec" => sorted(&STREAMS, &[CONTAINER, COMMAND]),
                "portforward" => vec![PORTS],
                _ => vec![PROXY_PATH],
            };
            out.answer = None;
            out.kind = Some((sub.group, sub.version, sub.kind));
            out
        };
        methods.iter().map(connect).collect()
    }
}

fn sorted(some: &[Parameter], more: &[Parameter]) -> Vec<Parameter> {
    let mut all = [some, more].concat();
    all.sort_unstable_by_key(|(name, ..)| *name);
    all
}

/// What an operation does, in a few words; `part` is a subresource.
fn summary(action: &str, kind: &str, part: &str) -> String {
    let article = if kind.starts_with(['A', 'E', 'I', 'O', 'U']) { "an" } else { "a" };
    let the_part = if part.is_empty() { String::new() } else { format!("{part} of ") };
    match action {
        "list" => format!("list or watch objects of kind {kind}"),
        "watch" => format!("watch changes to an object of kind {kind}"),
        "watchlist" => format!("watch changes to objects of kind {kind}"),
        "post" => format!("create {the_part}{article} {kind}"),
        "put" => format!("replace {the_part}the specified {kind}"),
        "patch" => format!("partially update {the_part}the specified {kind}"),
        "delete" => format!("delete {article} {kind}"),
        "deletecollection" => format!("delete collection of {kind}"),
        _ => format!("read {the_part}the specified {kind}"),
    }
}

/// `ephemeralcontainers` as it is, `status` as `Status`.
fn camel(name: &str) -> String {
    name.split('/').map(capitalized).collect()
}
