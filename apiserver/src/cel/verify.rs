//! Whether an expression can work at all, before it is stored: it must parse, use only what is declared, and result in
//! what its place wants. What is wrong is told as the reference implementation tells it, with the place in the source.

use cel::IdedExpr;
use cel::common::ast::SourceInfo;

use super::check::{Complaint, Type, Variables, check_closed};
use super::{ENVIRONMENT, rewrite};

/// What the place of an expression wants it to result in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Anything,
    Bool,
    Text,
    TextOrNull,
    /// A patch: an object, or a list of them.
    Object,
    ListOfPatches,
}

impl Wanted {
    /// Names of the types, when it is known that the expression results in another one.
    fn refuses(self, found: &Type<'_>) -> Option<&'static str> {
        let names = match self {
            Self::Anything => return None,
            Self::Bool => "bool",
            Self::Text => "string",
            Self::TextOrNull => "one of [string null_type]",
            Self::Object => "Object",
            Self::ListOfPatches => "list(JSONPatch)",
        };
        let fits = match self {
            Self::Anything => true,
            Self::Bool => matches!(found, Type::Bool),
            Self::Text => matches!(found, Type::String),
            Self::TextOrNull => matches!(found, Type::String | Type::Null),
            Self::Object => matches!(found, Type::Map(_) | Type::Object(_) | Type::Record(_)),
            Self::ListOfPatches => matches!(found, Type::List(_)),
        };
        // What is not known to be wrong may be right.
        (!fits && !matches!(found, Type::Dyn)).then_some(names)
    }
}

/// The type of the expression, or what is wrong with it.
pub fn verify<'s>(source: &str, variables: &Variables<'s>, wanted: Wanted) -> Result<Type<'s>, String> {
    let (found, _) = check_types(source, variables)?;
    match wanted.refuses(&found) {
        Some(names) => Err(format!("must evaluate to {names} but got {found}")),
        None => Ok(found),
    }
}

/// The type of the expression and its tree, or what is wrong with it.
pub fn check_types<'s>(source: &str, variables: &Variables<'s>) -> Result<(Type<'s>, IdedExpr), String> {
    let parsed = ENVIRONMENT.parser().parse_with_source_info(source);
    let (mut tree, info) = parsed.map_err(|errors| {
        let located = errors.errors.iter().map(|error| {
            let (line, column) = (usize::try_from(error.pos.0), usize::try_from(error.pos.1));
            // Where an expression may end, the reference implementation tells only that.
            let text = match error.msg.split_once("expecting {<EOF>, ") {
                Some((start, _)) => format!("{start}expecting <EOF>"),
                None => error.msg.clone(),
            };
            // Nothing at all ends before its first letter.
            let column = if source.is_empty() { 0 } else { column.unwrap_or(0) };
            located(source, line.unwrap_or(0), column, &text)
        });
        failed(located)
    })?;
    rewrite::objects_as_maps(&mut tree);
    let (found, complaints) = check_closed(&tree, variables);
    if !complaints.is_empty() {
        return Err(failed(complaints.iter().map(|complaint| place(source, &info, complaint))));
    }
    Ok((found, tree))
}

fn failed(errors: impl Iterator<Item = String>) -> String {
    format!("compilation failed: {}", errors.collect::<Vec<_>>().join("\n"))
}

fn place(source: &str, info: &SourceInfo, complaint: &Complaint) -> String {
    let start = info.offset_for(complaint.node).map_or(0, |(start, _)| start as usize);
    let before: String = source.chars().take(start).collect();
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|letter| *letter != '\n').count() + 1;
    located(source, line, column, &complaint.text)
}

/// The complaint, the line it is about, and a pointer to the letter.
fn located(source: &str, line: usize, column: usize, text: &str) -> String {
    let mut told = format!("ERROR: <input>:{line}:{column}: {text}");
    if let Some(shown) = line.checked_sub(1).and_then(|index| source.lines().nth(index)) {
        let dots = ".".repeat(column.saturating_sub(1));
        told.push_str(&format!("\n | {}\n | {dots}^", shown.replace('\t', " ")));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_say_where() {
        let fields = Variables::from([("v".to_owned(), Type::Int)]);
        let variables =
            Variables::from([("object".to_owned(), Type::Dyn), ("variables".to_owned(), Type::Record(fields))]);
        let cases = [
            ("object.spec.a.all(x, x > 1) && variables.v == 2", Wanted::Bool, ""),
            ("object.list.exists_one(x, x == 1)", Wanted::Bool, ""),
            ("[1, 2].map(x, x + 1).sum() == math.greatest(4, 5)", Wanted::Bool, ""),
            ("Object{spec: Object.spec{a: 1}}", Wanted::Object, ""),
            ("variables.v", Wanted::Bool, "must evaluate to bool but got int"),
            (
                "Bad_Value!/ x",
                Wanted::Bool,
                "compilation failed: ERROR: <input>:1:10: Syntax error: mismatched input '!' expecting <EOF>\n | Bad_Value!/ x\n | .........^",
            ),
            (
                "'a'x",
                Wanted::Text,
                "compilation failed: ERROR: <input>:1:4: Syntax error: extraneous input 'x' expecting <EOF>\n | 'a'x\n | ...^",
            ),
            (
                "truex",
                Wanted::Bool,
                "compilation failed: ERROR: <input>:1:1: undeclared reference to 'truex' (in container '')\n | truex\n | ^",
            ),
            (
                "variables.w == 2",
                Wanted::Bool,
                "compilation failed: ERROR: <input>:1:10: undefined field 'w'\n | variables.w == 2\n | .........^",
            ),
            (
                "1 + variables.v > 'a'",
                Wanted::Bool,
                "compilation failed: ERROR: <input>:1:17: found no matching overload for '_>_' applied to '(int, string)'\n | 1 + variables.v > 'a'\n | ................^",
            ),
        ];
        for (source, wanted, expected) in cases {
            let told = verify(source, &variables, wanted).err().unwrap_or_default();
            assert_eq!(told, expected, "{source}");
        }
    }
}
