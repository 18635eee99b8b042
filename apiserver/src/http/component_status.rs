//! `componentstatuses`: asks the scheduler, the controller manager and every etcd member how they are, at the moment
//! when a client wants to know. Deprecated upstream, and still the first command of many a tutorial.

use std::time::Duration;

use apimachinery::status::Result;
use async_trait::async_trait;
use futures::future::join_all;
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::upgrade::reach_error;
use super::{Request, full};
use crate::registry::strategy::{Cx, SubresourceHandler};
use crate::server::Server;

const PATIENCE: Duration = Duration::from_secs(5);
/// More than this of a health answer is not looked at.
const ANSWER_LIMIT: usize = 4096;
/// Components on the same host, by the port of their health check.
const COMPONENTS: [(&str, u16); 2] = [("controller-manager", 10257), ("scheduler", 10259)];

pub struct Components;

#[async_trait]
impl SubresourceHandler for Components {
    async fn handle(&self, cx: &Cx<'_>, _name: &str, _verb: &str, _body: Value) -> Result<Value> {
        let components =
            COMPONENTS.iter().map(|(name, port)| async move { status(name, component(cx.server, *port).await) });
        let members = cx.server.config.etcd_servers.iter().enumerate();
        let members = members.map(|(index, url)| async move { status(&format!("etcd-{index}"), member(url).await) });
        let (mut items, members) = futures::join!(join_all(components), join_all(members));
        items.extend(members);
        Ok(json!({"items": items}))
    }
}

fn status(name: &str, answer: std::result::Result<String, String>) -> Value {
    let condition = match answer {
        Ok(message) => json!({"type": "Healthy", "status": "True", "message": message}),
        Err(error) => json!({"type": "Healthy", "status": "False", "error": error}),
    };
    json!({
        "kind": "ComponentStatus",
        "apiVersion": "v1",
        "metadata": {"name": name, "creationTimestamp": null},
        "conditions": [condition],
    })
}

/// What `/healthz` on the port says.
async fn component(server: &Server, port: u16) -> std::result::Result<String, String> {
    let url = format!("https://127.0.0.1:{port}/healthz");
    let failed = |why: &dyn std::fmt::Display| format!("Get {url:?}: {why}");
    let mut request = Request::new(full(""));
    *request.uri_mut() = url.parse().map_err(|error: http::uri::InvalidUri| failed(&error))?;
    let asked = async {
        let response =
            server.proxies.any_server().request(request).await.map_err(|error| failed(&reach_error(&url, &error)))?;
        let code = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await.map_err(|error| failed(&error))?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        if code.is_success() { Ok(text) } else { Err(format!("HTTP probe failed with statuscode: {}", code.as_u16())) }
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(failed(&"no answer in time")))
}

/// Whether an etcd member takes connections. That the cluster as a whole answers is what `/healthz/etcd` is for.
async fn member(url: &str) -> std::result::Result<String, String> {
    let address = url.split_once("://").map_or(url, |(_, rest)| rest).trim_end_matches('/');
    match timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok("ok".into()),
        Ok(Err(error)) => Err(reach_error(url, &error)),
        Err(_) => Err(format!("dial tcp {address}: no answer in time")),
    }
}
