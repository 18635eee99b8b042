//! The keys of an issuer: its discovery document says where they are. They are fetched when a token needs them, and
//! again when one is signed with a key that is not known yet; never more often than every few seconds, whatever tokens
//! are sent.

use std::time::Duration;

use arc_swap::ArcSwap;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{DecodingKey, Header, Validation, decode};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::settings::Issuer;
use crate::http::json_client::{ExchangeError, JsonClient};
use crate::http::outbound::{OutboundError, Trust};
use crate::registry::object::ObjectExt;

const TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("the issuer does not answer")]
    Exchange(#[from] ExchangeError),
    #[error("issuer did not match the issuer returned by provider, expected {expected:?} got {given:?}")]
    Issuer { expected: String, given: String },
    #[error("the issuer's discovery document has no jwks_uri")]
    NoKeys,
    #[error("the issuer could not be asked a moment ago")]
    TooSoon,
}

struct Known {
    id: Option<String>,
    key: DecodingKey,
}

pub struct Keys {
    issuer: String,
    discovery: String,
    client: JsonClient,
    known: ArcSwap<Vec<Known>>,
    /// Between two times that keys are fetched.
    pub pause: Duration,
    /// When keys were fetched last, and from where; held while they are fetched, so that one question is enough.
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    at: Option<Instant>,
    url: Option<String>,
}

impl Keys {
    pub fn new(issuer: &Issuer) -> Result<Self, OutboundError> {
        let trust = issuer.authority.as_ref().map_or(Trust::System, |pem| Trust::Pem(pem));
        let well_known = format!("{}/.well-known/openid-configuration", issuer.url.trim_end_matches('/'));
        Ok(Self {
            issuer: issuer.url.clone(),
            discovery: issuer.discovery_url.clone().unwrap_or(well_known),
            client: JsonClient::new(trust, None, TIMEOUT)?,
            known: ArcSwap::default(),
            pause: PAUSE,
            last: Mutex::default(),
        })
    }

    /// Whether one of the keys signed the token.
    pub async fn made_signature(&self, token: &str, header: &Header) -> Result<bool, KeysError> {
        let before = Instant::now();
        if any_made_signature(&self.known.load(), token, header) {
            return Ok(true);
        }
        self.fetch(before).await?;
        Ok(any_made_signature(&self.known.load(), token, header))
    }

    /// Fetches the keys, unless somebody else has done it since `asked`.
    async fn fetch(&self, asked: Instant) -> Result<(), KeysError> {
        let mut last = self.last.lock().await;
        if let Some(at) = last.at {
            if at >= asked {
                return Ok(());
            }
            if at.elapsed() < self.pause {
                return if self.known.load().is_empty() { Err(KeysError::TooSoon) } else { Ok(()) };
            }
        }
        let outcome = self.fetch_now(&mut last.url).await;
        last.at = Some(Instant::now());
        outcome
    }

    async fn fetch_now(&self, url: &mut Option<String>) -> Result<(), KeysError> {
        let url = match url {
            Some(url) => url.clone(),
            None => url.insert(self.discover().await?).clone(),
        };
        let set = self.client.get(&url).await?;
        let known = set.list_at(&["keys"]).iter().filter_map(read).collect();
        self.known.store(std::sync::Arc::new(known));
        Ok(())
    }

    async fn discover(&self) -> Result<String, KeysError> {
        let document = self.client.get(&self.discovery).await?;
        let given = document.str_at(&["issuer"]);
        if given != self.issuer {
            return Err(KeysError::Issuer { expected: self.issuer.clone(), given: given.to_owned() });
        }
        match document.str_at(&["jwks_uri"]) {
            "" => Err(KeysError::NoKeys),
            url => Ok(url.to_owned()),
        }
    }
}

/// Keys of kinds that nobody signs tokens with are left out.
fn read(jwk: &Value) -> Option<Known> {
    let jwk: Jwk = serde_json::from_value(jwk.clone()).ok()?;
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    Some(Known { id: jwk.common.key_id, key })
}

fn any_made_signature(known: &[Known], token: &str, header: &Header) -> bool {
    let mut validation = Validation::new(header.alg);
    // Times and audience have been looked at.
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    let mut named = known.iter().filter(|known| header.kid.is_none() || known.id.is_none() || known.id == header.kid);
    named.any(|known| decode::<Value>(token, &known.key, &validation).is_ok())
}
