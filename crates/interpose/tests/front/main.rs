//! What the front promises to programs, seen by programs: this one starts itself as a launcher, which starts it as a client.

mod clients;
mod echo;
mod raw;

use lockstep_interpose::{Error, Observer, Options, Program, run};
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = args[1..].iter().map(String::as_str).collect();
    match words[..] {
        ["client", "executed", fd, space] => clients::executed(fd.parse().unwrap(), space.parse().unwrap()),
        ["client", name, ..] => clients::ALL.iter().find(|(known, _)| *known == name).expect("a scenario").1(),
        ["launch", "--looks", ref program @ ..] => launch(program, true),
        ["launch", ref program @ ..] => launch(program, false),
        _ => std::process::exit(tests(&words)),
    }
}

/// Tells what the server tells, behind the program's own words.
struct Talker;

impl Observer for Talker {
    fn warning(&self, words: &str) {
        eprintln!("warning: {words}");
    }
}

/// Runs a program under the front; how many files were made and released comes last on stderr.
fn launch(program: &[&str], serves_looks: bool) {
    let world = Arc::default();
    let program = Program { name: program[0].into(), arguments: program[1..].iter().map(Into::into).collect() };
    let status =
        run(&program, echo::namespace(&world), &Options { gives_up_stdio: true, serves_looks, ..Options::default() }, Arc::new(Talker));
    eprintln!("{}", world.report());
    match status {
        Ok(status) => std::process::exit(status.code()),
        Err(error @ Error::NoNotification { .. }) => {
            eprintln!("{error}");
            std::process::exit(99);
        }
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(98);
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs our launcher on a program, with a limit of time.
fn launched(program: &[&str], prepare: impl FnOnce(&mut Command), meanwhile: impl FnOnce(&mut std::process::Child)) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("launch").args(program).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    prepare(&mut command);
    let mut child = command.spawn().unwrap();
    meanwhile(&mut child);
    let pid = child.id();
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if told.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("it hangs: killed");
            raw::kill(pid as i32, libc::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(tell);
    guard.join().unwrap();
    output
}

fn own() -> String {
    std::env::current_exe().unwrap().to_str().unwrap().to_owned()
}

fn scenario(name: &str) -> Output {
    launched(&[&own(), "client", name], |_| {}, |_| {})
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Every file that was made was released once.
fn check_released(output: &Output) {
    let err = text(&output.stderr);
    let last = err.lines().last().unwrap_or_default();
    let words: Vec<&str> = last.split(' ').collect();
    assert!(matches!(words[..], ["made", made, "released", released] if made == released), "{err}");
}

fn passes(name: &str) {
    let output = scenario(name);
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    check_released(&output);
}

/// Scenarios that only have to succeed.
const PLAIN: &[&str] = &[
    "opens",
    "ioctls",
    "transfers",
    "maps",
    "events",
    "duplicates",
    "inherits",
    "passes",
    "threads",
    "executes",
    "memory",
    "memory_of_files",
    "outlives",
    "takes_away",
    "identity",
    "status",
    "knobs",
    "directories",
    "slow",
    "many",
    "garbage",
    "panics",
    "process",
    "closes_in_threads",
    "victims",
    "forks_much",
    "guest_memory",
];

const OTHERS: &[(&str, fn())] = &[
    ("stdio_is_the_programs", stdio),
    ("stdio_closes_with_the_program", stdio_closes),
    ("exit_statuses", exit_statuses),
    ("signals", signals),
    ("descendants_are_served", descendants),
    ("not_startable", not_startable),
    ("shell_scripts", scripts),
    ("looks", looks),
    ("killed_launcher", killed_launcher),
    ("static_programs", static_programs),
    ("nothing_left_behind", nothing_left),
    ("nesting", nesting),
    ("low_limit", low_limit),
    ("without_privileges", without_privileges),
];

fn stdio() {
    let output = launched(
        &[&own(), "client", "stdio"],
        |command| _ = command.stdin(Stdio::piped()),
        |child| child.stdin.take().unwrap().write_all(b"words").unwrap(),
    );
    assert_eq!(text(&output.stdout), "out: words");
    assert!(text(&output.stderr).starts_with("err: words"));
}

/// Who reads the program's output sees when the program closes it.
fn stdio_closes() {
    let start = Instant::now();
    let output = launched(
        &["sh", "-c", "echo x; exec >&- <&-; sleep 1"],
        |_| {},
        |child| {
            let mut text = String::new();
            std::io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut text).unwrap();
            assert_eq!(text, "x\n");
            assert!(start.elapsed() < Duration::from_millis(900), "it was held open");
        },
    );
    assert_eq!(output.status.code(), Some(0));
}

fn exit_statuses() {
    assert_eq!(scenario("exits").status.code(), Some(42));
    let output = scenario("aborts");
    assert_eq!(output.status.code(), Some(128 + libc::SIGABRT));
    check_released(&output);
}

/// Whether this process ignores a signal, as shells have their background jobs do: then so does everything that it starts.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal - 1) & 1 != 0
}

fn signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        if is_ignored(signal) {
            eprintln!("signal {signal} is ignored in this process, and so cannot be tried");
            continue;
        }
        let output = launched(
            &[&own(), "client", "waits_for_signal"],
            // A process group of its own: whoever sends is not in it.
            |command| _ = std::os::unix::process::CommandExt::process_group(command, 0),
            |child| {
                let mut line = String::new();
                std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
                assert!(line.starts_with("ready"));
                raw::kill(child.id() as i32, signal);
            },
        );
        assert_eq!(output.status.code(), Some(128 + signal));
    }
}

fn descendants() {
    let output = scenario("leaves_a_child");
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(7), "served true\n"));
    check_released(&output);
}

fn not_startable() {
    let output = launched(&["/no/such/program"], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(98));
    assert!(text(&output.stderr).contains("cannot run /no/such/program: No such file"), "{}", text(&output.stderr));
    let output = launched(&["/etc/passwd"], |_| {}, |_| {});
    assert!(text(&output.stderr).contains("Permission denied"));
}

fn scripts() {
    let output = launched(&["sh", "-c", "cat /dev/echo-dir/name; exec 5<>/dev/echo; ls -l /proc/self/fd/5; exit 3"], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("the name\n") && text(&output.stdout).contains("memfd:echo"), "{}", text(&output.stdout));
    check_released(&output);
}

/// Programs that look before they open.
fn looks() {
    let output = launched(&["--looks", &own(), "client", "looks"], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let script = "test -c /dev/echo && test -d /dev/echo-dir && test -r /dev/echo-dir/name && ! test -w /dev/echo-dir/name && \
                  test -h /dev/echo-dir/class/first && test -c /dev/echo-dir/class/first && readlink /dev/echo-dir/class/first && \
                  ls -l /dev/echo-dir/ | grep -c name && stat -c %t:%T /dev/echo && ! test -e /dev/echo3 && test -d /dev && cat /dev/echo-dir/name";
    let output = launched(&["--looks", "sh", "-c", script], |_| {}, |_| {});
    assert_eq!(text(&output.stdout), "../devices/echo0\n1\n1ff:7\nthe name\n", "{}", text(&output.stderr));
    let output = launched(&["test", "-e", "/dev/echo"], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(1), "only when it was asked for");
}

/// A program does not go on without its server.
fn killed_launcher() {
    let mut program = 0;
    let output = launched(
        &[&own(), "client", "waits_for_signal"],
        |_| {},
        |child| {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
            program = line.trim().trim_start_matches("ready ").parse().unwrap();
            raw::kill(child.id() as i32, libc::SIGKILL);
        },
    );
    assert_eq!(output.status.code(), None);
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::fs::read_to_string(format!("/proc/{program}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "process {program} lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A program without a dynamic linker, when there is a compiler that makes one.
fn static_programs() {
    let folder = std::env::temp_dir().join(format!("front-static-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (source, program) = (folder.join("client.c"), folder.join("client"));
    let code = "#include <fcntl.h>\n#include <sys/ioctl.h>\nint main(void) { unsigned long word = 41; int fd = open(\"/dev/echo\", O_RDWR);\n\
                return fd < 0 || ioctl(fd, 0x3b80, &word) || word != 42; }\n";
    std::fs::write(&source, code).unwrap();
    let built = Command::new("cc").arg("-static").arg("-o").args([&program, &source]).output();
    if built.is_ok_and(|built| built.status.success()) {
        let output = launched(&[program.to_str().unwrap()], |_| {}, |_| {});
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        check_released(&output);
    } else {
        println!("    no static programs can be made here: skipped");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

fn nothing_left() {
    let shm = || {
        std::fs::read_dir("/dev/shm")
            .map_or(0, |list| list.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("lockstep-")).count())
    };
    let before = shm();
    passes("directories");
    assert_eq!(shm(), before);
}

fn nesting() {
    let output = launched(&[&own(), "launch", "true"], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(99));
    assert!(text(&output.stderr).contains("another server listens"), "{}", text(&output.stderr));
}

fn low_limit() {
    let script = format!("ulimit -n 20; exec {} launch true", own());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(text(&output.stderr).contains("raise it to at least 64"), "{}", text(&output.stderr));
    let script = format!("ulimit -n 128; exec {} launch {} client ioctls", own(), own());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // Lower than when it started: ioctls still work.
    let script = format!("ulimit -n 200; exec {} client limited", own());
    let output = launched(&["sh", "-c", &script], |_| {}, |_| {});
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("limits its open files to fewer than 768"));
}

/// As a user without any capability: it works, and says what does not.
fn without_privileges() {
    if rustix::process::getuid().is_root() {
        let copy = std::env::temp_dir().join(format!("front-user-{}", std::process::id()));
        std::fs::copy(own(), &copy).unwrap();
        let run = |name: &str| {
            let path = copy.to_str().unwrap();
            let mut command = Command::new(path);
            command.args(["launch", path, "client", name]).current_dir("/");
            std::os::unix::process::CommandExt::uid(&mut command, 65534);
            std::os::unix::process::CommandExt::gid(&mut command, 65534);
            command.output().unwrap()
        };
        for name in [
            "opens",
            "ioctls",
            "transfers",
            "maps",
            "events",
            "duplicates",
            "inherits",
            "passes",
            "threads",
            "memory_of_files",
            "directories",
        ] {
            let output = run(name);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
            assert!(text(&output.stderr).contains("set-user-ID programs run as you"));
            check_released(&output);
        }
        let output = run("memory");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("CAP_CHECKPOINT_RESTORE is missing"), "{}", text(&output.stderr));
        std::fs::remove_file(&copy).unwrap();
    } else {
        println!("    these tests run without privileges anyway: skipped");
    }
}

/// Runs what the words name, or everything.
fn tests(words: &[&str]) -> i32 {
    let filters: Vec<&&str> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(**filter));
    if words.contains(&"--list") {
        PLAIN.iter().copied().chain(OTHERS.iter().map(|(name, _)| *name)).for_each(|name| println!("{name}: test"));
        return 0;
    }
    let probe = launched(&["true"], |_| {}, |_| {});
    if probe.status.code() == Some(99) {
        println!("skipped: {}", text(&probe.stderr));
        return 0;
    }
    let mut failed = 0;
    let mut one = |name: &str, test: &dyn Fn()| {
        if wanted(name) {
            let start = Instant::now();
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)).is_ok();
            println!("test {name} ... {} ({} ms)", if passed { "ok" } else { "FAILED" }, start.elapsed().as_millis());
            failed += i32::from(!passed);
        }
    };
    PLAIN.iter().for_each(|name| one(name, &|| passes(name)));
    OTHERS.iter().for_each(|(name, test)| one(name, &|| test()));
    i32::from(failed != 0)
}
