//! The Common Expression Language as the API uses it: in match conditions, admission policies and schemas of custom
//! resources. The language itself is a library's; here are the variables, the functions that Kubernetes adds
//! (<https://kubernetes.io/docs/reference/using-api/cel/>), and how objects become values and values objects.

pub mod check;
mod functions;
mod json;
mod rewrite;
pub mod verify;

use std::sync::{Arc, LazyLock};

use cel::{Context, Env, IdedExpr, Value};
pub use json::{from_json, to_json};

static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(environment()));

fn environment() -> Env {
    use cel::extensions::{encoders, lists, math, strings};
    let mut env = Env::stdlib().with_optional_support(true);
    for extension in [strings, lists, math, encoders] {
        env.add_extension(extension).expect("the library's own extensions do not clash");
    }
    env
}

#[derive(Debug, thiserror::Error)]
pub enum CelError {
    #[error("compilation failed: {0}")]
    Compile(String),
    #[error("expression '{source_text}' resulted in error: {why}")]
    Evaluate { source_text: String, why: String },
    #[error("expression '{source_text}' does not result in a {expected}")]
    Type { source_text: String, expected: &'static str },
}

/// A compiled expression.
#[derive(Debug)]
pub struct Expression {
    source: String,
    tree: IdedExpr,
}

impl Expression {
    pub fn compile(source: &str) -> Result<Self, CelError> {
        let parsed = ENVIRONMENT.parser().parse(source);
        let mut tree = parsed.map_err(|errors| CelError::Compile(errors.to_string()))?;
        rewrite::objects_as_maps(&mut tree);
        Ok(Self { source: source.to_owned(), tree })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    pub fn tree(&self) -> &IdedExpr {
        &self.tree
    }

    pub fn evaluate(&self, scope: &Scope) -> Result<Value, CelError> {
        Value::resolve(&self.tree, &scope.0)
            .map_err(|error| CelError::Evaluate { source_text: self.source.clone(), why: reason(&error) })
    }

    pub fn evaluate_bool(&self, scope: &Scope) -> Result<bool, CelError> {
        match self.evaluate(scope)? {
            Value::Bool(answer) => Ok(answer),
            _ => Err(CelError::Type { source_text: self.source.clone(), expected: "bool" }),
        }
    }

    pub fn evaluate_string(&self, scope: &Scope) -> Result<String, CelError> {
        match self.evaluate(scope)? {
            Value::String(text) => Ok(text.to_string()),
            _ => Err(CelError::Type { source_text: self.source.clone(), expected: "string" }),
        }
    }
}

/// The words of the reference implementation, where users look for them.
fn reason(error: &cel::ExecutionError) -> String {
    match error {
        cel::ExecutionError::NoSuchKey(key) => format!("no such key: {key}"),
        error => error.to_string(),
    }
}

/// The variables that an expression sees.
pub struct Scope(Context<'static, 'static>);

impl Default for Scope {
    fn default() -> Self {
        let mut context = Context::with_env(ENVIRONMENT.clone());
        functions::add(&mut context);
        Self(context)
    }
}

impl Scope {
    pub fn set(&mut self, name: &str, value: Value) {
        self.0.add_variable_from_value(name, value);
    }

    pub fn set_json(&mut self, name: &str, value: &serde_json::Value) {
        self.set(name, from_json(value));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scope() -> Scope {
        let mut scope = Scope::default();
        let object =
            json!({"metadata": {"name": "web-1", "labels": {"a/b": "c"}}, "spec": {"replicas": 3, "list": [1, 2, 3]}});
        scope.set_json("object", &object);
        scope.set_json("oldObject", &serde_json::Value::Null);
        scope
    }

    #[test]
    fn conditions_are_answered() {
        let cases = [
            ("object.spec.replicas + 1 == 4", true),
            ("has(object.spec.missing)", false),
            ("oldObject == null", true),
            ("object.metadata.name.startsWith('web') && object.spec.list.all(x, x > 0)", true),
            ("'a/b' in object.metadata.labels", true),
            ("object.?spec.?missing.orValue(7) == 7", true),
            ("object.metadata.name.find('[0-9]+') == '1'", true),
            ("object.spec.list.sum() == 6 && [1, 3, 2].max() == 3 && !([2, 1].isSorted())", true),
            ("object.metadata.name.split('-')[1] == '1'", true),
        ];
        for (source, expected) in cases {
            let answer = Expression::compile(source).unwrap().evaluate_bool(&scope());
            assert_eq!(answer.unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn errors_name_the_expression() {
        let missing = Expression::compile("object.spec.missing == 1").unwrap().evaluate_bool(&scope()).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "expression 'object.spec.missing == 1' resulted in error: no such key: missing"
        );
        assert!(Expression::compile("object.spec.").is_err());
        assert!(Expression::compile("1").unwrap().evaluate_bool(&scope()).is_err());
    }

    #[test]
    fn objects_are_built() {
        let source = "Object{spec: Object.spec{replicas: object.spec.replicas * 2, on: true}}";
        let value = Expression::compile(source).unwrap().evaluate(&scope()).unwrap();
        assert_eq!(to_json(&value).unwrap(), json!({"spec": {"replicas": 6, "on": true}}));
    }
}
