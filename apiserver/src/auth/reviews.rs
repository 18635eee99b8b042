//! The resources that are questions: access reviews, rules reviews, token reviews, "who am I". They are answered at
//! once and never stored.

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use serde_json::{Map, Value, json};

use super::rules::PolicyRule;
use super::{Attributes, Decision, UserInfo};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, Strategy, SubresourceHandler};

/// Which question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Review {
    SelfSubjectAccess,
    SubjectAccess,
    LocalSubjectAccess,
    SelfSubjectRules,
    SelfSubject,
    Token,
}

/// The strategy of each review, by group and resource; `None` for other resources.
pub fn strategy(group: &str, resource: &str) -> Option<&'static dyn Strategy> {
    Some(match (group, resource) {
        ("authorization.k8s.io", "selfsubjectaccessreviews") => &Review::SelfSubjectAccess,
        ("authorization.k8s.io", "subjectaccessreviews") => &Review::SubjectAccess,
        ("authorization.k8s.io", "localsubjectaccessreviews") => &Review::LocalSubjectAccess,
        ("authorization.k8s.io", "selfsubjectrulesreviews") => &Review::SelfSubjectRules,
        ("authentication.k8s.io", "selfsubjectreviews") => &Review::SelfSubject,
        ("authentication.k8s.io", "tokenreviews") => &Review::Token,
        _ => return None,
    })
}

impl Strategy for Review {
    fn answers_create(&self) -> Option<&'static dyn SubresourceHandler> {
        Some(match self {
            Self::SelfSubjectAccess => &Self::SelfSubjectAccess,
            Self::SubjectAccess => &Self::SubjectAccess,
            Self::LocalSubjectAccess => &Self::LocalSubjectAccess,
            Self::SelfSubjectRules => &Self::SelfSubjectRules,
            Self::SelfSubject => &Self::SelfSubject,
            Self::Token => &Self::Token,
        })
    }
}

#[async_trait]
impl SubresourceHandler for Review {
    async fn handle(&self, cx: &Cx<'_>, _name: &str, _verb: &str, mut body: Value) -> Result<Value> {
        if *self == Self::SelfSubject {
            // Upstream answers with a review of its own making.
            body["metadata"] = json!({"creationTimestamp": crate::verbs::timestamp(cx.now)});
        }
        let status = match self {
            Self::SelfSubjectAccess | Self::SubjectAccess | Self::LocalSubjectAccess => self.access(cx, &body).await?,
            Self::SelfSubjectRules => rules(cx, &body)?,
            Self::SelfSubject => json!({"userInfo": user_json(cx.user)}),
            Self::Token => token(cx, &body).await?,
        };
        body.set(&["status"], status);
        if *self == Self::SelfSubjectRules {
            body["metadata"] = json!({});
            body["spec"] = json!({});
        }
        Ok(body)
    }
}

impl Review {
    async fn access(self, cx: &Cx<'_>, body: &Value) -> Result<Value> {
        let mut body = body.clone();
        if self == Self::LocalSubjectAccess {
            if body.namespace().is_empty() {
                body.set(&["metadata", "namespace"], cx.namespace);
            }
            if body.namespace() != cx.namespace {
                let (namespace, wanted) = (body.namespace(), cx.namespace);
                let message =
                    format!("namespace on request ({wanted}) does not match namespace on review ({namespace})");
                return Err(Status::bad_request(message));
            }
        }
        let errors = self.validate(&body);
        if !errors.is_empty() {
            // Upstream's object does not know its kind at this point.
            return Err(Status::invalid(&GroupKind::new("authorization.k8s.io", ""), "", &errors));
        }
        let subject = match self {
            Self::SelfSubjectAccess => cx.user.clone(),
            _ => subject_of(&body),
        };
        let spec = &body["spec"];
        let selector = field_selector(spec);
        let decision = cx.server.auth.decide(&*cx.server.caches, &attributes(&subject, spec, &selector)).await;
        let mut status = json!({"allowed": decision.is_allowed()});
        if matches!(decision, Decision::Deny(_)) {
            status["denied"] = true.into();
        }
        if !decision.reason().is_empty() {
            status["reason"] = decision.reason().into();
        }
        Ok(status)
    }

    fn validate(self, body: &Value) -> Vec<FieldError> {
        let spec = &body["spec"];
        let given = |field: &str| spec.get(field).is_some_and(|value| !value.is_null());
        let (resource, path) = (given("resourceAttributes"), given("nonResourceAttributes"));
        let mut errors = Vec::new();
        if resource == path {
            let detail = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
            errors.push(FieldError::invalid("spec", spec["nonResourceAttributes"].clone(), detail));
        }
        let local = self == Self::LocalSubjectAccess;
        let meant = |name: &str| name == "managedFields" || (local && name == "namespace");
        if body["metadata"].as_object().is_some_and(|metadata| metadata.keys().any(|name| !meant(name))) {
            let detail = if local { "must be empty except for namespace" } else { "must be empty" };
            errors.push(FieldError::invalid("metadata", body["metadata"].clone(), detail));
        }
        for selector in ["fieldSelector", "labelSelector"] {
            selector_attributes(&spec["resourceAttributes"][selector], selector, &mut errors);
        }
        if self != Self::SelfSubjectAccess && spec.str_at(&["user"]).is_empty() && spec.list_at(&["groups"]).is_empty()
        {
            errors.push(FieldError::invalid("spec.user", "", "at least one of user or group must be specified"));
        }
        let namespace = spec.str_at(&["resourceAttributes", "namespace"]);
        if self == Self::LocalSubjectAccess && resource && namespace != body.namespace() {
            errors.push(FieldError::invalid(
                "spec.resourceAttributes.namespace",
                namespace,
                "must match metadata.namespace",
            ));
        }
        if self == Self::LocalSubjectAccess && path {
            let value = spec["nonResourceAttributes"].clone();
            errors.push(FieldError::invalid("spec.nonResourceAttributes", value, "disallowed on this kind of request"));
        }
        errors
    }
}

/// A selector of a question: its text or its requirements, well formed as far as their operators are known.
fn selector_attributes(selector: &Value, name: &str, errors: &mut Vec<FieldError>) {
    if selector.is_null() {
        return;
    }
    let path = format!("spec.resourceAttributes.{name}");
    let (raw, requirements) = (selector.str_at(&["rawSelector"]), selector.list_at(&["requirements"]));
    if !raw.is_empty() && !requirements.is_empty() {
        let detail = "may not specified at the same time as requirements";
        errors.push(FieldError::invalid(format!("{path}.rawSelector"), raw, detail));
    }
    if raw.is_empty() && requirements.is_empty() {
        let detail = format!("when {path} is specified, requirements or rawSelector is required");
        errors.push(FieldError::required(format!("{path}.requirements"), detail));
    }
    for (index, requirement) in requirements.iter().enumerate() {
        let path = format!("{path}.requirements[{index}]");
        let values = requirement.list_at(&["values"]);
        match requirement.str_at(&["operator"]) {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(format!("{path}.values"), detail));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(format!("{path}.values"), detail));
            }
            _ => {}
        }
        let key = requirement.str_at(&["key"]);
        if name == "labelSelector" {
            let problems = apimachinery::meta::validation::is_qualified_name(key);
            errors.extend(problems.into_iter().map(|m| FieldError::invalid(format!("{path}.key"), key, m)));
        } else if key.is_empty() {
            errors.push(FieldError::required(format!("{path}.key"), "must be specified"));
        }
    }
}

fn attributes<'a>(user: &'a UserInfo, spec: &'a Value, field_selector: &'a str) -> Attributes<'a> {
    if let Some(path) = spec.get("nonResourceAttributes").filter(|attributes| !attributes.is_null()) {
        return Attributes::path(user, path.str_at(&["verb"]), path.str_at(&["path"]));
    }
    let text = |field| spec.str_at(&["resourceAttributes", field]);
    Attributes {
        api_version: text("version"),
        subresource: text("subresource"),
        namespace: text("namespace"),
        name: text("name"),
        field_selector,
        ..Attributes::resource(user, text("verb"), text("group"), text("resource"))
    }
}

/// The field selector of the question as a list request would write it; requirements of other forms restrict nothing
/// that an authorizer knows of, and leaving them out only makes the answer stricter.
fn field_selector(spec: &Value) -> String {
    let selector = &spec["resourceAttributes"]["fieldSelector"];
    let raw = selector.str_at(&["rawSelector"]);
    if !raw.is_empty() {
        return raw.to_owned();
    }
    let single = |requirement: &Value| match requirement.list_at(&["values"]) {
        [value] if requirement["operator"] == "In" => {
            Some(format!("{}={}", requirement.str_at(&["key"]), value.as_str().unwrap_or_default()))
        }
        _ => None,
    };
    let terms: Vec<String> = selector.list_at(&["requirements"]).iter().filter_map(single).collect();
    terms.join(",")
}

fn subject_of(body: &Value) -> UserInfo {
    let texts =
        |value: &Value| value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    let spec = &body["spec"];
    let extra = spec.map_at(&["extra"]).into_iter().flatten();
    UserInfo {
        name: spec.str_at(&["user"]).to_owned(),
        uid: spec.str_at(&["uid"]).to_owned(),
        groups: texts(&spec["groups"]),
        extra: extra.map(|(key, values)| (key.to_ascii_lowercase(), texts(values))).collect(),
    }
}

/// The `user` of a token review.
pub fn user_of_review(user: &Value) -> UserInfo {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    UserInfo {
        name: user.str_at(&["username"]).to_owned(),
        uid: user.str_at(&["uid"]).to_owned(),
        groups: texts(&user["groups"]),
        extra: user.map_at(&["extra"]).into_iter().flatten().map(|(key, list)| (key.clone(), texts(list))).collect(),
    }
}

/// The same back.
pub fn user_json(user: &UserInfo) -> Value {
    let mut json = Map::new();
    json.insert("username".into(), user.name.as_str().into());
    if !user.uid.is_empty() {
        json.insert("uid".into(), user.uid.as_str().into());
    }
    if !user.groups.is_empty() {
        json.insert("groups".into(), user.groups.clone().into());
    }
    if !user.extra.is_empty() {
        json.insert("extra".into(), json!(user.extra));
    }
    json.into()
}

fn rules(cx: &Cx<'_>, body: &Value) -> Result<Value> {
    let namespace = body.str_at(&["spec", "namespace"]);
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let auth = &cx.server.auth;
    let all = PolicyRule { verbs: vec!["*".into()], ..PolicyRule::default() };
    let (mut held, errors) = match auth.rbac() {
        Some(rbac) => rbac.rules_for(&*cx.server.caches, cx.user, namespace),
        None => (Vec::new(), Vec::new()),
    };
    if auth.allows_everything() || cx.user.is_in(super::MASTERS) {
        held.push(PolicyRule { api_groups: vec!["*".into()], resources: vec!["*".into()], ..all.clone() });
        held.push(PolicyRule { non_resource_urls: vec!["*".into()], ..all });
    }
    let (paths, resources): (Vec<_>, Vec<_>) = held.into_iter().partition(|rule| rule.resources.is_empty());
    let is_node = super::node::node_identity(cx.user).is_some();
    let mut status =
        json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": is_node || !errors.is_empty()});
    let mut texts = errors;
    if is_node {
        texts.push("node authorizer does not support user rule resolution".into());
    }
    match texts.as_slice() {
        [] => {}
        [one] => status["evaluationError"] = one.as_str().into(),
        many => status["evaluationError"] = format!("[{}]", many.join(", ")).into(),
    }
    Ok(status)
}

async fn token(cx: &Cx<'_>, body: &Value) -> Result<Value> {
    let token = body.str_at(&["spec", "token"]);
    if token.is_empty() {
        return Err(Status::bad_request("token is required for TokenReview in authentication"));
    }
    let audiences: Vec<String> =
        body.list_at(&["spec", "audiences"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let Some((mut user, good_for)) = cx.server.auth.token_user(&*cx.server.caches, token, &audiences).await else {
        return Ok(json!({"user": {}, "error": "invalid bearer token"}));
    };
    super::add_group_of_everybody(&mut user);
    let mut status = json!({"authenticated": true, "user": user_json(&user)});
    if !good_for.is_empty() {
        status["audiences"] = good_for.into();
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reviews_must_ask_exactly_one_question() {
        let errors = |review: Review, body: Value| {
            review.validate(&body).iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let resource = json!({"resourceAttributes": {"namespace": "a", "verb": "get", "resource": "pods"}});
        assert_eq!(errors(Review::SelfSubjectAccess, json!({"spec": resource})), "");
        assert!(
            errors(Review::SelfSubjectAccess, json!({"spec": {}})).contains("exactly one of nonResourceAttributes")
        );
        assert!(errors(Review::SubjectAccess, json!({"spec": resource})).contains("at least one of user or group"));
        let local =
            json!({"metadata": {"namespace": "b"}, "spec": {"user": "u", "resourceAttributes": {"namespace": "a"}}});
        assert!(errors(Review::LocalSubjectAccess, local).contains("must match metadata.namespace"));
    }

    #[test]
    fn questions_become_attributes() {
        let spec = json!({"resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "a",
            "fieldSelector": {"requirements": [{"key": "spec.nodeName", "operator": "In", "values": ["n"]}]}}});
        let (user, selector) = (UserInfo::default(), field_selector(&spec));
        let asked = attributes(&user, &spec, &selector);
        assert_eq!(
            (asked.verb, asked.resource, asked.namespace, asked.field_selector),
            ("list", "pods", "a", "spec.nodeName=n")
        );
    }
}
