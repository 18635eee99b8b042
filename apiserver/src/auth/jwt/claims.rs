//! From the claims of a token to a user: claims that are taken as they are, or expressions that make something of them,
//! and rules that all must hold.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::UserInfo;
use crate::cel::{CelError, Expression, Scope, to_json};

/// Where upstream keeps which credential was used.
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error("parse {what} {claim:?}: claim not present or not of the right type")]
    Claim { what: &'static str, claim: String },
    #[error("email not verified")]
    Unverified,
    #[error("empty username via CEL expression is not allowed")]
    NoName,
    #[error("error evaluating {what} expression: {source}")]
    Expression { what: &'static str, source: CelError },
    #[error("error evaluating {what} expression: it must result in {wanted}")]
    Type { what: &'static str, wanted: &'static str },
    #[error("required claim {claim} not present in ID token")]
    Missing { claim: String },
    #[error("required claim {claim} value does not match. Got = {given}, want = {wanted}")]
    Different { claim: String, given: String, wanted: String },
    #[error("error evaluating {what}: {message}")]
    Rule { what: &'static str, message: String },
}

/// How a part of a user is found.
#[derive(Debug)]
pub enum Source {
    Claim { name: String, prefix: String },
    Expression(Expression),
}

/// An expression that must hold, and what is said when it does not.
#[derive(Debug)]
pub struct Rule {
    pub expression: Expression,
    pub message: String,
}

#[derive(Debug)]
pub struct Mappings {
    pub username: Source,
    pub groups: Option<Source>,
    pub uid: Option<Source>,
    /// By key.
    pub extra: Vec<(String, Expression)>,
    pub required: BTreeMap<String, String>,
    pub claim_rules: Vec<Rule>,
    pub user_rules: Vec<Rule>,
}

impl Mappings {
    pub fn user(&self, claims: &Value) -> Result<UserInfo, ClaimError> {
        let mut scope = Scope::default();
        if self.has_expressions() {
            scope.set_json("claims", claims);
        }
        let mut user = UserInfo {
            name: self.name(claims, &scope)?,
            uid: self.uid(claims, &scope)?,
            groups: self.groups(claims, &scope)?,
            extra: self.extra(claims, &scope)?,
        };
        user.groups.retain(|group| !group.is_empty());
        self.check_required(claims)?;
        check_rules(&self.claim_rules, "claim validation expression", &scope)?;
        if !self.user_rules.is_empty() {
            let shown = json!({"username": user.name, "uid": user.uid, "groups": user.groups, "extra": user.extra});
            scope.set_json("user", &shown);
            check_rules(&self.user_rules, "user info validation rule", &scope)?;
        }
        Ok(user)
    }

    fn has_expressions(&self) -> bool {
        let sources = [Some(&self.username), self.groups.as_ref(), self.uid.as_ref()];
        let is_expression = |source: &&Source| matches!(source, Source::Expression(_));
        sources.iter().flatten().any(is_expression) || !self.extra.is_empty() || !self.claim_rules.is_empty()
    }

    fn name(&self, claims: &Value, scope: &Scope) -> Result<String, ClaimError> {
        match &self.username {
            Source::Expression(expression) => match text(expression, "username claim", scope)? {
                name if name.is_empty() => Err(ClaimError::NoName),
                name => Ok(name),
            },
            Source::Claim { name, prefix } => {
                let given = string_claim(claims, name, "username claims")?;
                // Who does not say whether the address was verified is believed.
                if name == "email" && claims.get("email_verified").is_some_and(|verified| *verified != true) {
                    return Err(ClaimError::Unverified);
                }
                Ok(format!("{prefix}{given}"))
            }
        }
    }

    fn uid(&self, claims: &Value, scope: &Scope) -> Result<String, ClaimError> {
        match &self.uid {
            None => Ok(String::new()),
            Some(Source::Claim { name, .. }) => string_claim(claims, name, "uid claim"),
            Some(Source::Expression(expression)) => text(expression, "uid claim", scope),
        }
    }

    fn groups(&self, claims: &Value, scope: &Scope) -> Result<Vec<String>, ClaimError> {
        match &self.groups {
            None => Ok(vec![]),
            Some(Source::Claim { name, prefix }) => {
                let wrong = || ClaimError::Claim { what: "groups claim", claim: name.clone() };
                let given = claims.get(name).map_or(Some(vec![]), texts).ok_or_else(wrong)?;
                Ok(given.into_iter().map(|group| format!("{prefix}{group}")).collect())
            }
            Some(Source::Expression(expression)) => list(expression, "group claim", scope),
        }
    }

    fn extra(&self, claims: &Value, scope: &Scope) -> Result<BTreeMap<String, Vec<String>>, ClaimError> {
        let mut extra = BTreeMap::new();
        if let Some(id) = claims["jti"].as_str().filter(|id| !id.is_empty()) {
            extra.insert(CREDENTIAL_ID.to_owned(), vec![format!("JTI={id}")]);
        }
        for (key, expression) in &self.extra {
            let values = list(expression, "extra claim", scope)?;
            if !values.is_empty() {
                extra.insert(key.clone(), values);
            }
        }
        Ok(extra)
    }

    fn check_required(&self, claims: &Value) -> Result<(), ClaimError> {
        for (claim, wanted) in &self.required {
            match claims.get(claim) {
                None => return Err(ClaimError::Missing { claim: claim.clone() }),
                Some(Value::String(given)) if given == wanted => {}
                Some(given) => {
                    let given = given.as_str().map_or_else(|| given.to_string(), str::to_owned);
                    return Err(ClaimError::Different { claim: claim.clone(), given, wanted: wanted.clone() });
                }
            }
        }
        Ok(())
    }
}

fn string_claim(claims: &Value, claim: &str, what: &'static str) -> Result<String, ClaimError> {
    let given = claims[claim].as_str().map(str::to_owned);
    given.ok_or_else(|| ClaimError::Claim { what, claim: claim.to_owned() })
}

fn text(expression: &Expression, what: &'static str, scope: &Scope) -> Result<String, ClaimError> {
    expression.evaluate_string(scope).map_err(|source| match source {
        CelError::Type { .. } => ClaimError::Type { what, wanted: "a string" },
        source => ClaimError::Expression { what, source },
    })
}

fn list(expression: &Expression, what: &'static str, scope: &Scope) -> Result<Vec<String>, ClaimError> {
    let value = expression.evaluate(scope).map_err(|source| ClaimError::Expression { what, source })?;
    let value = to_json(value.as_ref()).as_ref().and_then(texts);
    let texts = value.ok_or(ClaimError::Type { what, wanted: "a string or a list of strings" })?;
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

/// One text or many; nothing is none.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(vec![]),
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(many) => many.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn check_rules(rules: &[Rule], what: &'static str, scope: &Scope) -> Result<(), ClaimError> {
    for rule in rules {
        match rule.expression.evaluate_bool(scope) {
            Ok(true) => {}
            Ok(false) => {
                let source = rule.expression.source();
                let message = match rule.message.as_str() {
                    "" => format!("validation expression '{source}' failed"),
                    message => format!("validation expression '{source}' failed: {message}"),
                };
                return Err(ClaimError::Rule { what, message });
            }
            Err(source) => return Err(ClaimError::Expression { what, source }),
        }
    }
    Ok(())
}
