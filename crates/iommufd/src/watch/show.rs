//! One call as a line: text as strace writes it, or JSON.

use super::errno_name;
use crate::uapi::{Field, IovaRange, Show};
use crate::{Refusal, Seen};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::time::Duration;
use zerocopy::{FromZeros, IntoBytes};

/// `NAME({what was given} => {what has changed}) = answer`, with the reason behind an error.
pub(super) fn text(call: &Seen<'_>, answer: Result<i64, &Refusal>) -> String {
    let mut line = prefix(call.caller.ids());
    match call.name {
        "" => _ = write!(line, "ioctl {:#x}", call.command),
        name => line.push_str(name),
    }
    line.push('(');
    if call.given.is_empty() {
        // A bare number is mostly small, an address is not.
        _ = if call.arg < 4096 { write!(line, "{}", call.arg) } else { write!(line, "{:#x}", call.arg) };
    } else {
        line.push('{');
        fields(&mut line, call.fields.iter().filter(|field| is_shown(field, call)).map(|field| (field, field.value(call.given))));
        line.push('}');
        list(&mut line, call, &["IOMMU_IOAS_ALLOW_IOVAS"], call.given);
        let mut changed = changed(call).peekable();
        if changed.peek().is_some() {
            line.push_str(" => {");
            fields(&mut line, changed);
            line.push('}');
            list(&mut line, call, &["IOMMU_IOAS_IOVA_RANGES"], call.bytes);
        }
    }
    line.push_str(") = ");
    match answer {
        Ok(value) => _ = write!(line, "{value}"),
        Err(refusal) => _ = write!(line, "-1 {} ({})", errno_name(refusal.errno), one_line(&refusal.to_string())),
    }
    line.push('\n');
    line
}

/// The same as an object.
pub(super) fn json(call: &Seen<'_>, answer: Result<i64, &Refusal>, took: Duration) -> String {
    let object = |list: &mut dyn Iterator<Item = (&Field, u64)>| -> Value {
        list.map(|(field, value)| (field.name.to_owned(), signed(field, value))).collect::<Map<_, _>>().into()
    };
    let mut line = json!({
        "event": "ioctl",
        "file": call.file,
        "command": call.command,
        "nanoseconds": u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
    });
    if !call.name.is_empty() {
        line["name"] = call.name.into();
    }
    if let Some((pid, tid)) = call.caller.ids() {
        (line["pid"], line["tid"]) = (pid.into(), tid.into());
    }
    if call.given.is_empty() {
        line["arg"] = call.arg.into();
    } else {
        line["given"] =
            object(&mut call.fields.iter().filter(|field| field.offset < call.given.len()).map(|field| (field, field.value(call.given))));
        line["changed"] = object(&mut changed(call));
    }
    match answer {
        Ok(value) => line["answer"] = value.into(),
        Err(refusal) => (line["errno"], line["why"]) = (errno_name(refusal.errno).into(), refusal.to_string().into()),
    }
    format!("{line}\n")
}

/// Who calls, when that is another process.
pub(super) fn prefix(ids: Option<(i32, i32)>) -> String {
    match ids {
        None => String::new(),
        Some((pid, tid)) if pid == tid => format!("[pid {pid}] "),
        Some((pid, tid)) => format!("[pid {pid} thread {tid}] "),
    }
}

fn signed(field: &Field, value: u64) -> Value {
    if matches!(field.show, Show::Fd) { (value as u32).cast_signed().into() } else { value.into() }
}

/// Not what goes without saying: sizes as they should be, reserved fields that are zero.
fn is_shown(field: &Field, call: &Seen<'_>) -> bool {
    let value = field.value(call.given);
    let as_known = field.offset == 0 && matches!(field.name, "size" | "argsz") && value == known_size(call.fields);
    field.offset < call.given.len() && !as_known && !(matches!(field.show, Show::Reserved) && value == 0)
}

fn known_size(fields: &[Field]) -> u64 {
    fields.iter().map(|field| field.offset + field.size).max().unwrap_or(0) as u64
}

fn changed<'a>(call: &'a Seen<'_>) -> impl Iterator<Item = (&'a Field, u64)> {
    let values = call.fields.iter().map(|field| (field, field.value(call.given), field.value(call.bytes)));
    values.filter(|(field, before, now)| before != now && field.offset < call.bytes.len()).map(|(field, _, now)| (field, now))
}

fn fields<'a>(line: &mut String, list: impl Iterator<Item = (&'a Field, u64)>) {
    for (index, (field, value)) in list.enumerate() {
        let _ = write!(line, "{}{}=", if index == 0 { "" } else { ", " }, field.name);
        show(line, field.show, value);
    }
}

fn show(line: &mut String, how: Show, value: u64) {
    let _ = match how {
        Show::Hex | Show::Reserved => write!(line, "{value:#x}"),
        Show::Dec => write!(line, "{value}"),
        Show::Fd => write!(line, "{}", (value as u32).cast_signed()),
        Show::Enum(names) => match names.iter().find(|(known, _)| *known == value) {
            Some((_, name)) => line.write_str(name),
            None => write!(line, "{value}"),
        },
        Show::Flags(names) => flags(line, names, value),
    };
}

fn flags(line: &mut String, names: &[(u64, &str)], value: u64) -> std::fmt::Result {
    let mut rest = value;
    for (bit, name) in names.iter().filter(|(bit, _)| value & bit != 0) {
        write!(line, "{}{name}", if rest == value { "" } else { "|" })?;
        rest &= !bit;
    }
    match rest {
        0 if value == 0 => line.write_char('0'),
        0 => Ok(()),
        // What nobody knows is what went wrong, mostly.
        _ => write!(line, "{}{rest:#x}", if rest == value { "" } else { "|" }),
    }
}

/// At most so many ranges of a list are shown.
const MOST_SHOWN: u64 = 8;

/// The ranges that a structure points to.
fn list(line: &mut String, call: &Seen<'_>, names: &[&str], bytes: &[u8]) {
    if !names.contains(&call.name) {
        return;
    }
    let value = |name: &str| call.fields.iter().find(|field| field.name == name).map_or(0, |field| field.value(bytes));
    // As many as there is room for, and as there are.
    let given = call.fields.iter().find(|field| field.name == "num_iovas").map_or(0, |field| field.value(call.given));
    let (count, at) = (value("num_iovas").min(given), value("allowed_iovas"));
    line.push_str(" [");
    for index in 0..count.min(MOST_SHOWN) {
        let mut range = IovaRange::new_zeroed();
        if call.caller.read(at.wrapping_add(index * size_of::<IovaRange>() as u64), range.as_mut_bytes()).is_err() {
            line.push_str("unreadable");
            break;
        }
        let _ = write!(line, "{}{:#x}..={:#x}", if index == 0 { "" } else { ", " }, range.start, range.last);
    }
    line.push_str(if count > MOST_SHOWN { ", ...]" } else { "]" });
}

fn one_line(text: &str) -> String {
    text.replace('\n', "; ")
}
