//! Object literals (`Object.spec{replicas: 3}`, `JSONPatch{op: "add"}`) become map literals before evaluation: their
//! types are only known to the schemas, and their values are maps.

use cel::IdedExpr;
use cel::common::ast::{EntryExpr, Expr, IdedEntryExpr, LiteralValue, MapEntryExpr, MapExpr};

pub fn objects_as_maps(tree: &mut IdedExpr) {
    children(&mut tree.expr).into_iter().for_each(objects_as_maps);
    if let Expr::Struct(literal) = &mut tree.expr {
        let entries = std::mem::take(&mut literal.entries).into_iter().map(as_map_entry).collect();
        tree.expr = Expr::Map(MapExpr { entries });
    }
}

fn as_map_entry(entry: IdedEntryExpr) -> IdedEntryExpr {
    let expr = match entry.expr {
        EntryExpr::StructField(field) => {
            let name = Expr::Literal(LiteralValue::String(field.field.into()));
            let key = IdedExpr { id: entry.id, expr: name };
            EntryExpr::MapEntry(MapEntryExpr { key, value: field.value, optional: field.optional })
        }
        entry => entry,
    };
    IdedEntryExpr { id: entry.id, expr }
}

fn children(expr: &mut Expr) -> Vec<&mut IdedExpr> {
    match expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => vec![],
        Expr::Call(call) => call.target.as_deref_mut().into_iter().chain(&mut call.args).collect(),
        Expr::Comprehension(c) => {
            vec![&mut c.iter_range, &mut c.accu_init, &mut c.loop_cond, &mut c.loop_step, &mut c.result]
        }
        Expr::List(list) => list.elements.iter_mut().collect(),
        Expr::Map(map) => map.entries.iter_mut().flat_map(entry_children).collect(),
        Expr::Struct(literal) => literal.entries.iter_mut().flat_map(entry_children).collect(),
        Expr::Select(select) => vec![&mut select.operand],
    }
}

fn entry_children(entry: &mut IdedEntryExpr) -> Vec<&mut IdedExpr> {
    match &mut entry.expr {
        EntryExpr::StructField(field) => vec![&mut field.value],
        EntryExpr::MapEntry(entry) => vec![&mut entry.key, &mut entry.value],
    }
}
