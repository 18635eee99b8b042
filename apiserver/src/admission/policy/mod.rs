//! Admission policies: `ValidatingAdmissionPolicy` and `MutatingAdmissionPolicy`, judged in this process by expressions.
//! A policy does nothing until a binding names it; a binding gives it parameters and says what a refusal means.
//! Compiling and matching are here, judging in `validating`, changing in `mutating`.

mod mutating;
pub mod types;
mod validating;

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::meta::{GroupVersion, LabelSelector};
use arc_swap::ArcSwap;
use cel::common::value::Val;
use serde_json::Value;

use super::matching::{Rule, Selectors, version_of};
use super::{AdmissionRequest, cached, conditions};
use crate::cache::Stored;
use crate::cel::{Expression, Scope};
use crate::registry::object::ObjectExt;
use crate::registry::{Resource, Served};
use crate::server::Server;

pub use mutating::MutatingAdmissionPolicy;
pub use validating::ValidatingAdmissionPolicy;

const GROUP: &str = "admissionregistration.k8s.io";

/// What both sorts of policies have in common; `B` is what they do.
struct Policy<B> {
    name: String,
    ignores_failure: bool,
    matches: Constraints,
    conditions: conditions::Conditions,
    variables: Vec<(String, Compiled)>,
    /// `apiVersion` and kind of its parameters.
    param_kind: Option<(String, String)>,
    body: B,
}

/// An expression, or why it cannot be used.
type Compiled = Result<Expression, String>;

fn compile(source: &str) -> Compiled {
    Expression::compile(source).map_err(|error| error.to_string())
}

struct Binding {
    name: String,
    matches: Option<Constraints>,
    param_ref: Value,
    actions: Vec<String>,
}

/// A policy with its bindings.
struct Bound<B> {
    policy: Policy<B>,
    bindings: Vec<Binding>,
}

/// `matchConstraints` and `matchResources`.
struct Constraints {
    rules: Vec<Rule>,
    excluded: Vec<Rule>,
    selectors: Selectors,
    is_exact: bool,
}

impl Constraints {
    fn read(spec: &Value) -> Self {
        let rules = |field: &str| spec.list_at(&[field]).iter().map(Rule::read).collect();
        Self {
            rules: rules("resourceRules"),
            excluded: rules("excludeResourceRules"),
            selectors: Selectors::read(&spec["namespaceSelector"], &spec["objectSelector"]),
            is_exact: spec["matchPolicy"] == "Exact",
        }
    }

    /// The version in which the request is looked at. Without rules everything matches, as in bindings.
    fn version(
        &self,
        server: &Server,
        request: &AdmissionRequest<'_>,
    ) -> apimachinery::status::Result<Option<(Arc<Resource>, Arc<Served>)>> {
        let found = if self.rules.is_empty() {
            let resource = server.registry.get(&request.gvr.group, &request.gvr.resource);
            resource
                .and_then(|resource| resource.version(&request.gvr.version).cloned().map(|served| (resource, served)))
        } else {
            version_of(server, &self.rules, self.is_exact, request)
        };
        let excluded = version_of(server, &self.excluded, self.is_exact, request).is_some();
        match found {
            Some(found) if !excluded && self.selectors.match_request(server, request)? => Ok(Some(found)),
            _ => Ok(None),
        }
    }
}

/// All policies of one sort, compiled once per change of them or their bindings.
struct Policies<B> {
    policies: &'static str,
    bindings: &'static str,
    compiled: ArcSwap<Generation<B>>,
    read_body: fn(&Value) -> B,
}

struct Generation<B> {
    of: Vec<(String, u64)>,
    bound: Vec<Bound<B>>,
}

impl<B> Policies<B> {
    fn new(policies: &'static str, bindings: &'static str, read_body: fn(&Value) -> B) -> Self {
        let empty = Generation { of: vec![], bound: vec![] };
        Self { policies, bindings, compiled: ArcSwap::from_pointee(empty), read_body }
    }

    /// Those that are bound, by name.
    fn current(&self, server: &Server) -> Arc<Generation<B>> {
        let listed = |resource: &str| -> Vec<Arc<Stored>> {
            let cache = server.caches.get(GROUP, resource).filter(|cache| !cache.is_empty());
            let mut objects: Vec<_> = cache.map(|cache| cache.list(None).into_iter().collect()).unwrap_or_default();
            objects.sort_by(|a: &Arc<Stored>, b| a.name().cmp(b.name()));
            objects
        };
        let bindings = listed(self.bindings);
        let policies = if bindings.is_empty() { vec![] } else { listed(self.policies) };
        let compiled = self.compiled.load_full();
        let all = || policies.iter().chain(&bindings);
        let is_same =
            |(known, stored): (&(String, u64), &Arc<Stored>)| known.0 == stored.name() && known.1 == stored.revision;
        if compiled.of.len() == all().count() && compiled.of.iter().zip(all()).all(is_same) {
            return compiled;
        }
        let of = all().map(|stored| (stored.name().to_owned(), stored.revision)).collect();
        let generation = Arc::new(Generation { of, bound: self.bind(&policies, &bindings) });
        self.compiled.store(generation.clone());
        generation
    }

    fn bind(&self, policies: &[Arc<Stored>], bindings: &[Arc<Stored>]) -> Vec<Bound<B>> {
        let mut by_policy: HashMap<String, Vec<Binding>> = HashMap::new();
        for stored in bindings {
            let binding = stored.value();
            let spec = &binding["spec"];
            let actions = spec.list_at(&["validationActions"]).iter().filter_map(Value::as_str).map(str::to_owned);
            by_policy.entry(spec.str_at(&["policyName"]).to_owned()).or_default().push(Binding {
                name: binding.name().to_owned(),
                matches: spec["matchResources"].is_object().then(|| Constraints::read(&spec["matchResources"])),
                param_ref: spec["paramRef"].clone(),
                actions: actions.collect(),
            });
        }
        let bound = policies.iter().filter_map(|stored| {
            let bindings = by_policy.remove(stored.name())?;
            Some(Bound { policy: self.read(&stored.value()), bindings })
        });
        bound.collect()
    }

    fn read(&self, policy: &Value) -> Policy<B> {
        let spec = &policy["spec"];
        let variable =
            |variable: &Value| (variable.str_at(&["name"]).to_owned(), compile(variable.str_at(&["expression"])));
        let kind = &spec["paramKind"];
        Policy {
            name: policy.name().to_owned(),
            ignores_failure: spec["failurePolicy"] == "Ignore",
            matches: Constraints::read(&spec["matchConstraints"]),
            conditions: conditions::Conditions::read(spec.list_at(&["matchConditions"])),
            variables: spec.list_at(&["variables"]).iter().map(variable).collect(),
            param_kind: kind
                .is_object()
                .then(|| (kind.str_at(&["apiVersion"]).to_owned(), kind.str_at(&["kind"]).to_owned())),
            body: (self.read_body)(spec),
        }
    }
}

impl<B> Policy<B> {
    /// What its expressions see, but for the parameters and variables.
    fn scope(
        &self,
        server: &Arc<Server>,
        request: &AdmissionRequest<'_>,
        resource: &Arc<Resource>,
        served: &Arc<Served>,
    ) -> Result<Scope, String> {
        let mut scope = conditions::scope_of(server, request, resource, served)?;
        let namespace = match request.namespace {
            "" => None,
            namespace => cached(server, "", "namespaces", "", namespace),
        };
        scope.set_json("namespaceObject", &namespace.unwrap_or_default());
        Ok(scope)
    }

    /// Adds the variables in their order. One that fails is left out: only expressions that use it fail with it.
    fn set_variables(&self, scope: &mut Scope) {
        let mut values: Vec<(String, Box<dyn Val>)> = Vec::new();
        for (name, expression) in &self.variables {
            scope.set("variables", crate::cel::map(values.iter().cloned()));
            let value = expression.as_ref().ok().and_then(|expression| expression.evaluate(scope).ok());
            values.extend(value.map(|value| (name.clone(), value)));
        }
        scope.set("variables", crate::cel::map(values.into_iter()));
    }

    /// The parameters that a binding gives: one evaluation for each. `Err`: why there are none though there must be.
    fn params(&self, server: &Server, binding: &Binding, request: &AdmissionRequest<'_>) -> Result<Vec<Value>, String> {
        let Some((api_version, kind)) = &self.param_kind else { return Ok(vec![Value::Null]) };
        let reference = &binding.param_ref;
        if !reference.is_object() {
            return Ok(vec![Value::Null]);
        }
        let group_version = GroupVersion::parse(api_version)
            .ok_or_else(|| format!("paramKind {api_version:?} is not a group and version"))?;
        let resource = server.registry.by_kind(&group_version.group, kind);
        let resource = resource
            .ok_or_else(|| format!("failed to find resource referenced by paramKind: '{api_version}, Kind={kind}'"))?;
        let served = resource.version(&group_version.version);
        let served = served.ok_or_else(|| format!("paramKind {api_version} of {kind} is not served"))?;
        let namespace = match (resource.namespaced, reference.str_at(&["namespace"])) {
            (false, _) => "",
            (true, "") => request.namespace,
            (true, given) => given,
        };
        let shown = |stored: &Stored| resource.present(served, stored.value()).map_err(|status| status.message);
        let name = reference.str_at(&["name"]);
        let found: Vec<Value> = if name.is_empty() {
            let selector = LabelSelector::from_json(&reference["selector"]).map_err(|error| error.to_string())?;
            let objects = resource.cache.list(Some(namespace).filter(|namespace| !namespace.is_empty()));
            objects
                .iter()
                .filter(|object| selector.matches(|key| object.label(key)))
                .map(|object| shown(object))
                .collect::<Result<_, _>>()?
        } else {
            resource.cache.get(namespace, name).iter().map(|object| shown(object)).collect::<Result<_, _>>()?
        };
        if found.is_empty() && reference["parameterNotFoundAction"] != "Allow" {
            return Err("no params found for policy binding with `Deny` parameterNotFoundAction".into());
        }
        Ok(found)
    }
}
