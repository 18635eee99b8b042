//! Bearer tokens of OpenID Connect issuers: JSON web tokens whose claims say who the caller is. Which issuers are trusted
//! and what their claims mean comes from `--authentication-config` or the `--oidc-*` flags (`settings`); the issuer's
//! keys are fetched when they are first needed and kept (`keys`).

mod claims;
mod keys;
mod settings;
#[cfg(test)]
mod tests;

use base64::Engine;
use jsonwebtoken::{Algorithm, decode_header};
use serde_json::Value;

use super::UserInfo;
use crate::registry::object::ObjectExt;
pub use claims::ClaimError;
use keys::{Keys, KeysError};
pub use settings::{AuthenticationConfig, Issuer, SettingsError, of_flags};

/// Seconds by which an issuer's clock may be ahead of ours.
const LEEWAY: i64 = 300;

#[derive(Debug, thiserror::Error)]
pub enum JwtError {
    #[error("oidc: verify token: malformed token")]
    Malformed,
    #[error("oidc: verify token: signed with unsupported algorithm {0:?}")]
    Algorithm(Algorithm),
    #[error("oidc: verify token: the issuer's keys cannot be had")]
    Keys(#[from] KeysError),
    #[error("oidc: verify token: no key of the issuer made the signature")]
    Signature,
    #[error("oidc: verify token: token is expired or says not when it expires")]
    Expired,
    #[error("oidc: verify token: current time is before the nbf (not before) time")]
    NotYet,
    #[error("oidc: verify token: expected audience in {wanted:?} got {given:?}")]
    Audience { wanted: Vec<String>, given: Vec<String> },
    #[error("oidc: {0}")]
    Claims(#[from] ClaimError),
}

/// Knows the tokens of one issuer.
pub struct JwtAuthenticator {
    issuer: Issuer,
    keys: Keys,
}

impl JwtAuthenticator {
    pub fn new(issuer: Issuer) -> Result<Self, SettingsError> {
        let keys =
            Keys::new(&issuer).map_err(|source| SettingsError::Authority { issuer: issuer.url.clone(), source })?;
        Ok(Self { issuer, keys })
    }

    /// `Ok(None)`: the token is none of this issuer's.
    pub async fn user(&self, token: &str, now: i64) -> Result<Option<UserInfo>, JwtError> {
        let Some(unchecked) = payload(token) else { return Ok(None) };
        if unchecked["iss"] != self.issuer.url.as_str() {
            return Ok(None);
        }
        let header = decode_header(token).map_err(|_| JwtError::Malformed)?;
        if !self.issuer.algorithms.contains(&header.alg) {
            return Err(JwtError::Algorithm(header.alg));
        }
        // What can be said without the signature is said first: it spares the issuer a question.
        check_times(&unchecked, now)?;
        self.check_audience(&unchecked)?;
        if !self.keys.made_signature(token, &header).await? {
            return Err(JwtError::Signature);
        }
        Ok(Some(self.issuer.mappings.user(&unchecked)?))
    }

    fn check_audience(&self, claims: &Value) -> Result<(), JwtError> {
        let given: Vec<String> = match &claims["aud"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => vec![],
        };
        match self.issuer.audiences.iter().any(|wanted| given.contains(wanted)) {
            true => Ok(()),
            false => Err(JwtError::Audience { wanted: self.issuer.audiences.clone(), given }),
        }
    }
}

/// The claims of a token, unchecked.
fn payload(token: &str) -> Option<Value> {
    let mut parts = token.split('.');
    let (_, payload, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
    let mut claims: Value = serde_json::from_slice(&bytes).ok()?;
    // Google's tokens have two names for their issuer.
    if claims.str_at(&["iss"]) == "accounts.google.com" {
        claims["iss"] = "https://accounts.google.com".into();
    }
    claims.is_object().then_some(claims)
}

fn check_times(claims: &Value, now: i64) -> Result<(), JwtError> {
    let seconds = |claim: &str| {
        let value = &claims[claim];
        #[allow(clippy::cast_possible_truncation, reason = "times of tokens are seconds, whole ones or not")]
        value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds as i64))
    };
    if seconds("exp").is_none_or(|expires| expires < now) {
        return Err(JwtError::Expired);
    }
    match seconds("nbf") {
        Some(begins) if begins > now + LEEWAY => Err(JwtError::NotYet),
        _ => Ok(()),
    }
}
