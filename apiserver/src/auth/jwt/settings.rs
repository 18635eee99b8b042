//! `AuthenticationConfiguration` (`apiserver.config.k8s.io`), and the `--oidc-*` flags that say the same of one issuer.
//! <https://kubernetes.io/docs/reference/access-authn-authz/authentication/#using-authentication-configuration>

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jsonwebtoken::Algorithm;
use serde_json::Value;

use super::super::kubeconfig::{KubeconfigError, read_yaml};
use super::claims::{Mappings, Rule, Source};
use crate::cel::Expression;
use crate::config::Config;
use crate::http::outbound::OutboundError;
use crate::registry::object::ObjectExt;

const VERSIONS: [&str; 3] =
    ["apiserver.config.k8s.io/v1", "apiserver.config.k8s.io/v1beta1", "apiserver.config.k8s.io/v1alpha1"];
const MOST_ISSUERS: usize = 64;

/// An issuer whose tokens are trusted.
#[derive(Debug)]
pub struct Issuer {
    pub url: String,
    pub discovery_url: Option<String>,
    /// PEM; nothing: the machine's authorities.
    pub authority: Option<Vec<u8>>,
    /// A token must be for one of these.
    pub audiences: Vec<String>,
    pub algorithms: Vec<Algorithm>,
    pub mappings: Mappings,
}

/// What the file says.
#[derive(Debug)]
pub struct AuthenticationConfig {
    pub issuers: Vec<Issuer>,
    /// `None`: as the flag says.
    pub anonymous: Option<bool>,
    /// Where anonymous requests are let in; none: everywhere.
    pub anonymous_paths: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error(transparent)]
    File(#[from] KubeconfigError),
    #[error("{path}: {field}: {what}")]
    Field { path: PathBuf, field: String, what: String },
    #[error("--{flag}: {what}")]
    Flag { flag: &'static str, what: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("issuer {issuer:?}: its certificate authority cannot be used")]
    Authority { issuer: String, source: OutboundError },
}

impl AuthenticationConfig {
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let config = read_yaml(path)?;
        Self::from_value(&config).map_err(|Wrong { field, what }| SettingsError::Field {
            path: path.to_owned(),
            field,
            what,
        })
    }

    fn from_value(config: &Value) -> Result<Self, Wrong> {
        if config["kind"] != "AuthenticationConfiguration" {
            return Err(wrong("kind", "must be AuthenticationConfiguration"));
        }
        if !VERSIONS.contains(&config.api_version()) {
            return Err(wrong("apiVersion", format!("must be one of {}", VERSIONS.join(", "))));
        }
        let given = config.list_at(&["jwt"]);
        if given.len() > MOST_ISSUERS {
            return Err(wrong("jwt", format!("must have at most {MOST_ISSUERS} items")));
        }
        let mut issuers: Vec<Issuer> = Vec::new();
        for (index, jwt) in given.iter().enumerate() {
            let issuer = issuer(jwt, &format!("jwt[{index}]"))?;
            if issuers.iter().any(|other| other.url == issuer.url) {
                let field = format!("jwt[{index}].issuer.url");
                return Err(wrong(field, format!("Duplicate value: {:?}", issuer.url)));
            }
            issuers.push(issuer);
        }
        let anonymous = &config["anonymous"];
        let paths = anonymous.list_at(&["conditions"]).iter().map(|condition| condition.str_at(&["path"]).to_owned());
        Ok(Self { issuers, anonymous: anonymous["enabled"].as_bool(), anonymous_paths: paths.collect() })
    }
}

/// A field that is wrong, and why.
struct Wrong {
    field: String,
    what: String,
}

fn wrong(field: impl Into<String>, what: impl Into<String>) -> Wrong {
    Wrong { field: field.into(), what: what.into() }
}

fn issuer(jwt: &Value, at: &str) -> Result<Issuer, Wrong> {
    let given = &jwt["issuer"];
    let url = given.str_at(&["url"]);
    check_url(url).map_err(|what| wrong(format!("{at}.issuer.url"), what))?;
    let discovery_url = given.str_at(&["discoveryURL"]);
    if !discovery_url.is_empty() {
        let field = format!("{at}.issuer.discoveryURL");
        check_url(discovery_url).map_err(|what| wrong(&field, what))?;
        if discovery_url.trim_end_matches('/') == url.trim_end_matches('/') {
            return Err(wrong(field, "discoveryURL must be different from URL"));
        }
    }
    let audiences: Vec<String> =
        given.list_at(&["audiences"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let field = || format!("{at}.issuer.audiences");
    if audiences.is_empty() || audiences.iter().any(String::is_empty) {
        return Err(wrong(field(), "at least one jwt[].issuer.audiences is required, and none may be empty"));
    }
    let policy = given.str_at(&["audienceMatchPolicy"]);
    if !matches!(policy, "" | "MatchAny") || audiences.len() > 1 && policy.is_empty() {
        let what = "audienceMatchPolicy must be MatchAny for multiple audiences";
        return Err(wrong(format!("{at}.issuer.audienceMatchPolicy"), what));
    }
    if !given.str_at(&["egressSelectorType"]).is_empty() {
        return Err(wrong(format!("{at}.issuer.egressSelectorType"), "egress selectors are not supported"));
    }
    let authority = Some(given.str_at(&["certificateAuthority"])).filter(|pem| !pem.is_empty());
    Ok(Issuer {
        url: url.to_owned(),
        discovery_url: Some(discovery_url).filter(|url| !url.is_empty()).map(str::to_owned),
        authority: authority.map(|pem| pem.as_bytes().to_vec()),
        audiences,
        algorithms: ALGORITHMS.iter().map(|(_, algorithm)| *algorithm).collect(),
        mappings: mappings(jwt, at)?,
    })
}

/// An issuer is reached over TLS, and has no user, query or fragment.
fn check_url(url: &str) -> Result<(), String> {
    if url.is_empty() {
        return Err("URL is required".into());
    }
    let parsed: http::Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
    if parsed.scheme_str() != Some("https") {
        return Err(format!("{url:?}: URL scheme must be https"));
    }
    let authority = parsed.authority().map_or("", |authority| authority.as_str());
    if authority.contains('@') || url.contains('?') || url.contains('#') {
        return Err(format!("{url:?}: URL must not contain a username, password, query or fragment"));
    }
    Ok(())
}

fn mappings(jwt: &Value, at: &str) -> Result<Mappings, Wrong> {
    let given = &jwt["claimMappings"];
    let field = |name: &str| format!("{at}.claimMappings.{name}");
    let username = source(&given["username"], &field("username"), true)?;
    let username = username.ok_or_else(|| wrong(field("username"), "claim or expression is required"))?;
    let mut extra = Vec::new();
    for (index, entry) in given.list_at(&["extra"]).iter().enumerate() {
        let at = format!("{}[{index}]", field("extra"));
        let key = entry.str_at(&["key"]);
        if !key.contains('/') || key != key.to_lowercase() {
            return Err(wrong(format!("{at}.key"), "must be a domain-prefixed path in lower case"));
        }
        extra.push((key.to_owned(), compile(entry.str_at(&["valueExpression"]), &format!("{at}.valueExpression"))?));
    }
    let mut required = BTreeMap::new();
    let mut claim_rules = Vec::new();
    for (index, rule) in jwt.list_at(&["claimValidationRules"]).iter().enumerate() {
        let at = format!("{at}.claimValidationRules[{index}]");
        match (rule.str_at(&["claim"]), rule.str_at(&["expression"])) {
            ("", "") => return Err(wrong(at, "claim or expression is required")),
            ("", _) => claim_rules.push(expression_rule(rule, &at)?),
            (claim, "") => {
                required.insert(claim.to_owned(), rule.str_at(&["requiredValue"]).to_owned());
            }
            _ => return Err(wrong(at, "claim and expression can't both be set")),
        }
    }
    let mut user_rules = Vec::new();
    for (index, rule) in jwt.list_at(&["userValidationRules"]).iter().enumerate() {
        user_rules.push(expression_rule(rule, &format!("{at}.userValidationRules[{index}]"))?);
    }
    let mappings = Mappings {
        username,
        groups: source(&given["groups"], &field("groups"), true)?,
        uid: source(&given["uid"], &field("uid"), false)?,
        extra,
        required,
        claim_rules,
        user_rules,
    };
    check_email(&mappings, &field("username.expression"))?;
    Ok(mappings)
}

/// Who takes the address for a name must have it verified.
fn check_email(mappings: &Mappings, field: &str) -> Result<(), Wrong> {
    let Source::Expression(username) = &mappings.username else { return Ok(()) };
    if !username.source().contains("claims.email") || username.source().contains("claims.email_verified") {
        return Ok(());
    }
    let others = mappings.extra.iter().map(|(_, expression)| expression);
    let mut all = others.chain(mappings.claim_rules.iter().map(|rule| &rule.expression));
    if all.any(|expression| expression.source().contains("claims.email_verified")) {
        return Ok(());
    }
    let what = "claims.email_verified must be used in claimMappings.username.expression or claimMappings.extra[*].valueExpression or claimValidationRules[*].expression when claims.email is used in claimMappings.username.expression";
    Err(wrong(field, what))
}

fn source(given: &Value, at: &str, has_prefix: bool) -> Result<Option<Source>, Wrong> {
    let prefix = given.get("prefix").and_then(Value::as_str);
    match (given.str_at(&["claim"]), given.str_at(&["expression"])) {
        ("", "") if prefix.is_some() => Err(wrong(format!("{at}.prefix"), "prefix can't be set without a claim")),
        ("", "") => Ok(None),
        ("", _) if prefix.is_some() => Err(wrong(format!("{at}.prefix"), "prefix can't be set with an expression")),
        ("", expression) => compile(expression, &format!("{at}.expression")).map(Source::Expression).map(Some),
        (claim, "") => match prefix {
            None if has_prefix => Err(wrong(
                format!("{at}.prefix"),
                "prefix is required when claim is set. It can be set to an empty string to disable prefixing",
            )),
            prefix => Ok(Some(Source::Claim { name: claim.to_owned(), prefix: prefix.unwrap_or_default().to_owned() })),
        },
        _ => Err(wrong(at, "claim and expression can't both be set")),
    }
}

fn expression_rule(rule: &Value, at: &str) -> Result<Rule, Wrong> {
    let expression = compile(rule.str_at(&["expression"]), &format!("{at}.expression"))?;
    Ok(Rule { expression, message: rule.str_at(&["message"]).to_owned() })
}

fn compile(source: &str, field: &str) -> Result<Expression, Wrong> {
    if source.trim().is_empty() {
        return Err(wrong(field, "expression is required"));
    }
    Expression::compile(source).map_err(|error| wrong(field, error.to_string()))
}

const ALGORITHMS: [(&str, Algorithm); 8] = [
    ("RS256", Algorithm::RS256),
    ("RS384", Algorithm::RS384),
    ("RS512", Algorithm::RS512),
    ("ES256", Algorithm::ES256),
    ("ES384", Algorithm::ES384),
    ("PS256", Algorithm::PS256),
    ("PS384", Algorithm::PS384),
    ("PS512", Algorithm::PS512),
];

/// The issuer of the `--oidc-*` flags; `None` when they name none.
pub fn of_flags(config: &Config) -> Result<Option<Issuer>, SettingsError> {
    let flag = |flag: &'static str, what: String| SettingsError::Flag { flag, what };
    let (url, client) = (&config.oidc_issuer_url, &config.oidc_client_id);
    if url.is_empty() && client.is_empty() {
        return Ok(None);
    }
    check_url(url).map_err(|what| flag("oidc-issuer-url", what))?;
    if client.is_empty() {
        return Err(flag("oidc-client-id", "must be given together with --oidc-issuer-url".into()));
    }
    let read =
        |path: &PathBuf| std::fs::read(path).map_err(|source| SettingsError::Read { path: path.clone(), source });
    let algorithm = |name: &String| {
        let known = ALGORITHMS.iter().find(|(known, _)| known == name);
        known
            .map(|(_, algorithm)| *algorithm)
            .ok_or_else(|| flag("oidc-signing-algs", format!("unsupported signing alg: {name:?}")))
    };
    let required = |pair: &String| match pair.split_once('=') {
        Some((claim, value)) => Ok((claim.to_owned(), value.to_owned())),
        None => Err(flag("oidc-required-claim", format!("{pair:?} is not of the form claim=value"))),
    };
    let claim = config.oidc_username_claim.clone();
    let prefix = match config.oidc_username_prefix.as_str() {
        "-" => String::new(),
        // Names of other issuers must not be taken for names of this cluster.
        "" if claim != "email" => format!("{url}#"),
        prefix => prefix.to_owned(),
    };
    let groups = Some(&config.oidc_groups_claim).filter(|claim| !claim.is_empty());
    Ok(Some(Issuer {
        url: url.clone(),
        discovery_url: None,
        authority: config.oidc_ca_file.as_ref().map(read).transpose()?,
        audiences: vec![client.clone()],
        algorithms: config.oidc_signing_algs.iter().map(algorithm).collect::<Result<_, _>>()?,
        mappings: Mappings {
            username: Source::Claim { name: claim, prefix },
            groups: groups.map(|name| Source::Claim { name: name.clone(), prefix: config.oidc_groups_prefix.clone() }),
            uid: None,
            extra: vec![],
            required: config.oidc_required_claim.iter().map(required).collect::<Result<_, _>>()?,
            claim_rules: vec![],
            user_rules: vec![],
        },
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(jwt: Value) -> Result<AuthenticationConfig, String> {
        let config = json!({
            "apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration", "jwt": [jwt],
        });
        AuthenticationConfig::from_value(&config).map_err(|Wrong { field, what }| format!("{field}: {what}"))
    }

    #[test]
    fn fields_that_are_wrong_are_named() {
        let jwt = |changes: Value| {
            let mut jwt = json!({
                "issuer": {"url": "https://issuer", "audiences": ["a"]},
                "claimMappings": {"username": {"claim": "sub", "prefix": ""}},
            });
            apimachinery::merge::merge_patch(&mut jwt, &changes);
            read(jwt).map(|_| ()).unwrap_err()
        };
        assert!(
            read(json!({"issuer": {"url": "https://issuer", "audiences": ["a"]},
            "claimMappings": {"username": {"expression": "claims.sub"}, "groups": {"claim": "g", "prefix": "x:"}}}))
            .is_ok()
        );
        let cases = [
            (
                json!({"issuer": {"url": "http://issuer"}}),
                "jwt[0].issuer.url: \"http://issuer\": URL scheme must be https",
            ),
            (
                json!({"issuer": {"audiences": []}}),
                "jwt[0].issuer.audiences: at least one jwt[].issuer.audiences is required, and none may be empty",
            ),
            (
                json!({"issuer": {"audiences": ["a", "b"]}}),
                "jwt[0].issuer.audienceMatchPolicy: audienceMatchPolicy must be MatchAny for multiple audiences",
            ),
            (
                json!({"claimMappings": {"username": {"expression": "x"}}}),
                "jwt[0].claimMappings.username: claim and expression can't both be set",
            ),
            (
                json!({"claimMappings": {"extra": [{"key": "A", "valueExpression": "'x'"}]}}),
                "jwt[0].claimMappings.extra[0].key: must be a domain-prefixed path in lower case",
            ),
            (
                json!({"userValidationRules": [{"expression": " "}]}),
                "jwt[0].userValidationRules[0].expression: expression is required",
            ),
        ];
        for (changes, expected) in cases {
            assert_eq!(jwt(changes), expected);
        }
    }
}
