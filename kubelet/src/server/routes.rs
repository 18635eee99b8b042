//! Which path is answered by what. The paths are upstream's.

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use super::body::{self, Body};
use super::{Server, inspect, logs};
use crate::streaming::{self, Target};

pub(super) async fn route(server: &Server, request: Request<Incoming>) -> Response<Body> {
    let state = &server.state;
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let debugging = ["run", "exec", "attach", "portForward", "containerLogs", "runningpods", "logs"];
    if !state.config.enable_debugging_handlers && debugging.contains(&segments[0]) {
        return body::text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.\n");
    }
    let get = request.method() == Method::GET;
    let stream = get || request.method() == Method::POST;
    match segments.as_slice() {
        ["containerLogs", namespace, pod, container] if get => {
            logs::serve(state, namespace, pod, container, &query).await
        }
        ["exec", namespace, pod, container] if stream => {
            streaming::exec(state, request, Target { namespace, pod, uid: None, container }).await
        }
        ["exec", namespace, pod, uid, container] if stream => {
            streaming::exec(state, request, Target { namespace, pod, uid: Some(uid), container }).await
        }
        ["attach", namespace, pod, container] if stream => {
            streaming::attach(state, request, Target { namespace, pod, uid: None, container }).await
        }
        ["attach", namespace, pod, uid, container] if stream => {
            streaming::attach(state, request, Target { namespace, pod, uid: Some(uid), container }).await
        }
        ["portForward", namespace, pod] if stream => {
            streaming::port_forward(state, request, Target { namespace, pod, uid: None, container: "" }).await
        }
        ["portForward", namespace, pod, uid] if stream => {
            streaming::port_forward(state, request, Target { namespace, pod, uid: Some(uid), container: "" }).await
        }
        ["run", namespace, pod, container] if request.method() == Method::POST => {
            streaming::run(state, &query, Target { namespace, pod, uid: None, container }).await
        }
        ["run", namespace, pod, uid, container] if request.method() == Method::POST => {
            streaming::run(state, &query, Target { namespace, pod, uid: Some(uid), container }).await
        }
        ["containerLogs" | "exec" | "attach" | "portForward" | "run", ..] => {
            body::text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed")
        }
        _ if !get => body::text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
        _ => inspect::answer(server, &segments, &query).await,
    }
}
