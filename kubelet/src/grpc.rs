//! gRPC over unix sockets, both ends of it: the calls that the kubelet makes to the container runtime and to plugins,
//! and the services that it offers to plugins and agents of the node. Messages are written out beside their users with
//! the fields that are needed; there is no generated code.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use apimachinery::process::{CancellationToken, error_chain};
use axum::Router;
use futures::Stream;
use http::uri::PathAndQuery;
use tokio::net::UnixListener;
use tonic::client::Grpc as Client;
use tonic::server::Grpc as Server;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// Answers of plugins that list many devices are large; the same limit as for the container runtime.
const MAX_MESSAGE: usize = 16 << 20;

/// A call that failed, in the words that users know from events.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rpc error: code = {code:?} desc = {message}")]
pub struct CallError {
    pub code: Code,
    pub message: String,
}

impl CallError {
    /// The other side may have done, or may still do, what it was asked for. The codes are those after which upstream
    /// takes an operation on a volume for unfinished.
    pub fn is_uncertain(&self) -> bool {
        let unfinished =
            [Code::Cancelled, Code::DeadlineExceeded, Code::Unavailable, Code::ResourceExhausted, Code::Aborted];
        unfinished.contains(&self.code)
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let message = match std::error::Error::source(&status) {
            // The library says only "transport error"; why is in its sources.
            Some(source) => error_chain(source),
            None => status.message().to_owned(),
        };
        Self { code: status.code(), message }
    }
}

/// A connection to `socket` that is made when it is first used, and again when the other side has restarted.
pub fn channel(socket: &Path) -> Channel {
    let path = socket.to_owned();
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
    }))
}

/// Messages of one call.
pub trait Message: prost::Message + Default + Send + Sync + 'static {}

impl<M: prost::Message + Default + Send + Sync + 'static> Message for M {}

async fn ready(channel: &Channel) -> Result<Client<Channel>, Status> {
    let mut client = Client::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE);
    client.ready().await.map_err(|error| Status::unavailable(error_chain(&error)))?;
    Ok(client)
}

/// One question, one answer. `path` is `/package.Service/Method`; the other side is told of the deadline.
pub async fn call<Q: Message, A: Message>(
    channel: &Channel,
    path: &'static str,
    question: Q,
    within: Duration,
) -> Result<A, CallError> {
    let answer = async {
        let mut request = Request::new(question);
        request.set_timeout(within);
        let codec = ProstCodec::<Q, A>::default();
        ready(channel).await?.unary(request, PathAndQuery::from_static(path), codec).await
    };
    match tokio::time::timeout(within, answer).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => {
            let message = format!("no answer to {path} within {} s", within.as_secs());
            Err(CallError { code: Code::DeadlineExceeded, message })
        }
    }
}

/// One question, answers until one of the sides has enough.
pub async fn subscribe<Q: Message, A: Message>(
    channel: &Channel,
    path: &'static str,
    question: Q,
) -> Result<Streaming<A>, CallError> {
    let codec = ProstCodec::<Q, A>::default();
    let mut client = ready(channel).await?;
    Ok(client.server_streaming(Request::new(question), PathAndQuery::from_static(path), codec).await?.into_inner())
}

/// A server's answers, method by method.
#[derive(Default)]
pub struct Service {
    methods: Router,
}

impl Service {
    /// `answer` is asked for every call of `path` (`/package.Service/Method`).
    pub fn unary<Q, A, F, R>(self, path: &'static str, answer: F) -> Self
    where
        Q: Message,
        A: Message,
        F: Fn(Q) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Result<A, Status>> + Send + 'static,
    {
        let method = tower::service_fn(move |request: http::Request<axum::body::Body>| {
            let answer = answer.clone();
            let one = tower::service_fn(move |question: Request<Q>| {
                let answer = answer(question.into_inner());
                async move { answer.await.map(Response::new) }
            });
            let mut server = Server::new(ProstCodec::<A, Q>::default());
            async move { Ok::<_, std::convert::Infallible>(server.unary(one, request).await) }
        });
        Self { methods: self.methods.route_service(path, method) }
    }

    /// `answers` gives the stream that follows a call of `path`.
    pub fn streaming<Q, A, F, S>(self, path: &'static str, answers: F) -> Self
    where
        Q: Message,
        A: Message,
        F: Fn(Q) -> S + Clone + Send + Sync + 'static,
        S: Stream<Item = Result<A, Status>> + Send + 'static,
    {
        let method = tower::service_fn(move |request: http::Request<axum::body::Body>| {
            let answers = answers.clone();
            let one = tower::service_fn(move |question: Request<Q>| {
                let stream = answers(question.into_inner());
                async move { Ok::<_, Status>(Response::new(stream)) }
            });
            let mut server = Server::new(ProstCodec::<A, Q>::default());
            async move { Ok::<_, std::convert::Infallible>(server.server_streaming(one, request).await) }
        });
        Self { methods: self.methods.route_service(path, method) }
    }

    /// Listens on `socket`, in place of whatever was there before, and answers until told to end.
    pub fn start(self, socket: &Path, end: CancellationToken) -> Result<(), ServeError> {
        let failed = |step| move |source| ServeError { step, socket: socket.to_owned(), source };
        if let Some(directory) = socket.parent() {
            std::fs::create_dir_all(directory).map_err(failed("create the directory of"))?;
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(error)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(failed("listen on"))?;
        let unknown = || async { Status::unimplemented("unknown service or method").into_http::<axum::body::Body>() };
        let methods = self.methods.fallback(unknown);
        tokio::spawn(async move {
            let ended = async move { end.cancelled().await };
            if let Err(error) = axum::serve(listener, methods).with_graceful_shutdown(ended).await {
                tracing::error!(%error, "a socket of the kubelet is not served any more");
            }
        });
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot {step} the socket {socket}")]
pub struct ServeError {
    step: &'static str,
    socket: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    fn text(text: &str) -> Text {
        Text { text: text.to_owned() }
    }

    #[tokio::test]
    async fn calls_and_answers() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sub/s.sock");
        let end = CancellationToken::new();
        Service::default()
            .unary("/t.Echo/Say", |question: Text| async move {
                match question.text.as_str() {
                    "" => Err(Status::invalid_argument("nothing to say")),
                    said => Ok(text(&format!("{said}!"))),
                }
            })
            .unary("/t.Echo/Never", |_: Text| std::future::pending::<Result<Text, Status>>())
            .streaming("/t.Echo/Count", |question: Text| {
                futures::stream::iter([1, 2].map(move |number| Ok(text(&format!("{}{number}", question.text)))))
            })
            .start(&socket, end.clone())
            .unwrap();
        let channel = channel(&socket);
        let long = Duration::from_secs(20);
        assert_eq!(call::<Text, Text>(&channel, "/t.Echo/Say", text("hi"), long).await, Ok(text("hi!")));
        let refused = call::<Text, Text>(&channel, "/t.Echo/Say", text(""), long).await.unwrap_err();
        assert_eq!(refused.to_string(), "rpc error: code = InvalidArgument desc = nothing to say");
        let unknown = call::<Text, Text>(&channel, "/t.Echo/Other", text(""), long).await.unwrap_err();
        assert_eq!(unknown.code, Code::Unimplemented);
        let late = call::<Text, Text>(&channel, "/t.Echo/Never", text(""), Duration::from_millis(50)).await;
        assert!(late.unwrap_err().is_uncertain());
        let counted = subscribe::<Text, Text>(&channel, "/t.Echo/Count", text("n")).await.unwrap();
        let counted: Vec<Text> = counted.map(Result::unwrap).collect().await;
        assert_eq!(counted, [text("n1"), text("n2")]);
    }

    #[tokio::test]
    async fn nobody_listens() {
        let directory = tempfile::tempdir().unwrap();
        let channel = channel(&directory.path().join("none.sock"));
        let error = call::<Text, Text>(&channel, "/t.Echo/Say", text(""), Duration::from_secs(20)).await.unwrap_err();
        assert_eq!(error.code, Code::Unavailable);
        assert!(error.message.contains("No such file"), "{error}");
    }
}
