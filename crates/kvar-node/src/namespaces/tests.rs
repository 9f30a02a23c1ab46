//! Names, numbers and keys over starts with changing settings.
//!
//! What must always be true: a number is never another name's; what does not fit together is refused
//! with a way out, and a kill between two files costs nothing.

use super::*;
use tempfile::TempDir;

struct Store {
    dir: TempDir,
    key: KeyFile,
}

impl Store {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            key: KeyFile::generate(DeviceUuid::random()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Opens with these namespaces, as a settings file would name them.
    fn open(&self, names: &[&str]) -> Result<Namespaces, NamespaceError> {
        let mut config = Config::default();
        config
            .set("data", self.path("data").to_str().unwrap())
            .unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        config.set_all("namespace", &names).unwrap();
        config.validate().unwrap();
        Namespaces::open(&config, &self.key)
    }

    fn numbers(&self, names: &[&str]) -> Vec<(String, u8, Option<u32>)> {
        let namespaces = self.open(names).unwrap();
        let namespaces = namespaces.iter();
        namespaces
            .map(|it| (it.name.clone(), it.tenant.number(), it.share))
            .collect()
    }

    fn error(&self, names: &[&str], parts: &[&str]) {
        let error = self.open(names).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    }
}

fn row(name: &str, number: u8, share: impl Into<Option<u32>>) -> (String, u8, Option<u32>) {
    (name.to_owned(), number, share.into())
}

#[test]
fn numbers_stay_with_their_names_and_are_never_another_ones() {
    let store = Store::new();
    let first = store.numbers(&["b,share=2", "a"]);
    assert_eq!(
        first,
        [row("default", 0, 1), row("b", 1, 2), row("a", 2, 1)]
    );
    let key = |name| store.open(&["a", "b"]).unwrap().find(name).unwrap().1;
    let (a, b) = (key("a").to_hex(), key("b").to_hex());
    // One goes, another comes.
    let second = store.numbers(&["a,share=0", "c", "default,share=5"]);
    let expected = [
        row("default", 0, 5),
        row("b", 1, None),
        row("a", 2, 0),
        row("c", 3, 1),
    ];
    assert_eq!(second, expected);
    assert!(store.open(&["a"]).unwrap().find("b").is_none());
    // It comes back with what it had.
    assert_eq!(store.numbers(&["b"])[1], row("b", 1, 1));
    assert_eq!((key("a").to_hex(), key("b").to_hex()), (a, b));
}

#[test]
fn who_is_not_in_the_settings_has_no_share() {
    let store = Store::new();
    store.open(&["a", "b"]).unwrap();
    let shares = store.open(&["b,share=7"]).unwrap().shares();
    let weights = [0, 1, 2, 3].map(|number| shares.weight(Tenant::new(number).unwrap()));
    assert_eq!(weights, [1, 0, 7, 0]);
}

#[test]
fn a_kill_between_key_and_table_costs_nothing() {
    let store = Store::new();
    store.open(&["a", "b"]).unwrap();
    let keys = |store: &Store| {
        let namespaces = store.open(&["b", "a"]).unwrap();
        ["a", "b"].map(|name| {
            let (tenant, key) = namespaces.find(name).unwrap();
            (tenant, key.to_hex())
        })
    };
    let before = keys(&store);
    std::fs::remove_file(store.path("data.namespaces")).unwrap();
    assert_eq!(keys(&store), before);
}

#[test]
fn what_does_not_fit_together_is_refused_with_a_way_out() {
    let store = Store::new();
    store.open(&["a", "b"]).unwrap();
    let (key, table) = (store.path("data.a.key"), store.path("data.namespaces"));
    let whole = std::fs::read_to_string(&key).unwrap();
    let text = std::fs::read_to_string(&table).unwrap();
    std::fs::remove_file(&key).unwrap();
    store.error(&["a"], &["\"a\"", "data.a.key", "restore"]);
    std::fs::copy(store.path("data.b.key"), &key).unwrap();
    store.error(&["a"], &["\"a\"", "\"b\"", "key_file"]);
    let other = Store::new();
    other.open(&["a"]).unwrap();
    std::fs::copy(other.path("data.a.key"), &key).unwrap();
    store.error(&["a"], &["data.a.key", "store"]);
    std::fs::remove_file(&key).unwrap();
    store.key.create(&key).unwrap();
    store.error(&["a"], &["\"default\""]);
    std::fs::write(&key, &whole).unwrap();
    store.open(&["a"]).unwrap();
    for damage in [
        "",
        "{}",
        "[",
        &text.replace('1', "0"),
        &text.replace('2', "1"),
    ] {
        std::fs::write(&table, damage).unwrap();
        store.error(&["a"], &["data.namespaces", "damaged", "restore"]);
    }
    std::fs::write(&table, text.replace("\"a\"", "\"x\"")).unwrap();
    store.error(&["a"], &["number 1"]);
    std::fs::write(&table, text).unwrap();
    store.open(&["a", "b"]).unwrap();
}

#[test]
fn the_thirty_second_name_is_refused() {
    let store = Store::new();
    let names: Vec<String> = (1..TENANTS).map(|number| format!("n{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for names in names.chunks(10) {
        store.open(names).unwrap();
    }
    assert_eq!(store.numbers(&names).len(), TENANTS);
    store.error(&["more"], &["more", "never used again", "n31"]);
    assert!(!store.path("data.more.key").exists());
}
