//! Examples for the end of each command's help. A test holds them to the flags.

pub const RUN: &str = "Examples:
  strata run tests/models/shakespeare 'Who is there?'
  strata run MODEL_DIR --workers 3 --complete --prompt @prompt.txt --max-tokens 60
  strata run MODEL_DIR --message 'system=Answer in rhymes.'";

pub const SERVE: &str = "Examples:
  strata serve tests/models/shakespeare --workers 3
  strata serve MODEL_DIR --name llama,llama-8b --quantize int8 --port 8000
  strata serve MODEL_DIR --devices cpu:0=24GiB,cpu:1=24GiB --dry-run";

pub const COORDINATOR: &str = "Examples:
  strata coordinator --worker http://a:7801,http://b:7801 --model llama-8b
  strata coordinator --worker http://a:7801 --worker http://b:7801 --model llama-8b --dry-run
  strata coordinator --etcd http://e1:2379,http://e2:2379 --secret-file secret --model llama-8b";

pub const WORKER: &str = "Examples:
  strata worker --listen 0.0.0.0:7801 --models /srv
  strata worker --listen 0.0.0.0:7801 --models /srv --devices cpu=64GiB --threads 16
  strata worker --etcd http://e1:2379 --secret-file secret --listen 0.0.0.0:7801 --models /srv";

pub const PLAN: &str = "Examples:
  strata plan MODEL_DIR --workers 3
  strata plan MODEL_DIR --device 2x80GiB@3.3TB/s --quantize int8";

pub const CHECK: &str = "Examples:
  strata check MODEL_DIR
  strata check MODEL_DIR --quantize int4 --json";

pub const VERIFY: &str = "Examples:
  strata verify MODEL_DIR
  strata verify MODEL_DIR --against /mnt/other/MODEL_DIR
  strata verify MODEL_DIR --against digests.json --json";

pub const GENERATE: &str = "Examples:
  strata generate 'Once upon a time' --max-tokens 60
  strata generate --message 'user=Who is there?' --temperature 0.8 --top-p 0.95 --seed 7
  strata generate --messages @chat.json --tools @tools.json --template-argument thinking=false
  strata generate --prompt '-5 degrees are' --stop '--' --logit-bias 13=-2.5 --json --logprobs 3";

pub const CLASSIFY: &str = "Examples:
  strata classify --text 'What a day!' --text 'Not again.'
  strata classify --text 'A man sleeps.' --pair 'Somebody rests.' --json";

pub const RERANK: &str = "Examples:
  strata rerank 'Who wrote it?' 'A bridge is built.' 'She wrote it.'
  strata rerank @question.txt @first.txt @second.txt --top-n 1 --json";

pub const EMBED: &str = "Examples:
  strata embed --text 'What a day!' --text 'Not again.' --json
  strata embed --text 'A long text' --truncate head";

pub const TAG: &str = "Examples:
  strata tag 'Ada Lovelace lived in London.' --aggregation simple
  strata tag @letter.txt --aggregation first --json";

pub const ANSWER: &str = "Examples:
  strata answer --question 'Who wrote it?' --context 'Ada wrote it in 1843.'
  strata answer --question 'When?' --context @book.txt --top-k 3 --handle-impossible-answer --json";

pub const FILL_MASK: &str = "Examples:
  strata fill-mask --text 'Paris is the [MASK] of France.' --top-k 3";

pub const TOKENIZE: &str = "Examples:
  strata tokenize 'What a day!'
  strata tokenize @text.txt --plain --json";

pub const DETOKENIZE: &str = "Examples:
  strata detokenize 0,842,28,201 --keep-special";

pub const DRAIN: &str = "\
Examples:
  strata drain 10.0.0.7:7801 --reason 'new memory'
  strata drain gpu-3 --address http://a:7717 --secret-file /run/secrets/strata";

pub const UNDRAIN: &str = "\
Examples:
  strata undrain 10.0.0.7:7801";

pub const APPLY: &str = "\
Examples:
  strata apply deployment.toml --dry-run
  strata apply deployment.toml --address http://a:7717 --secret-file /run/secrets/strata";

pub const REBALANCE: &str = "\
Examples:
  strata rebalance --dry-run
  strata rebalance --address http://a:7717 --secret-file /run/secrets/strata";

pub const STATUS: &str = "Examples:
  strata status
  strata status --address http://a:7717 --json --timeout 2";

pub const BENCH: &str = "Examples:
  strata bench --concurrency 1,8,16 --prompt-tokens 512 --max-tokens 64
  strata bench --concurrency 8 --prompt-tokens 512 --shared-prefix 448 --json";

pub const PULL: &str = "Examples:
  strata pull Qwen/Qwen3-0.6B
  strata pull Qwen/Qwen3-0.6B@refs/pr/1
  strata pull Qwen/Qwen3-0.6B-GGUF --file Qwen3-0.6B-Q8_0.gguf";

pub const RANDOM_MODEL: &str = "Examples:
  strata random-model llama-1.1b /tmp/llama";

pub const KERNELS: &str = "Examples:
  strata kernels llama-8b --device cpu
  strata kernels MODEL_DIR --quantize int4 --rows 1,32,2048 --json";

pub const COMPLETIONS: &str = "Examples:
  strata completions bash >~/.local/share/bash-completion/completions/strata";

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use crate::args::Cli;

    /// Words of a line, where single quotes keep blanks.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            match at % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words.retain(|word| !word.starts_with('>'));
        words
    }

    #[test]
    fn every_command_has_examples_that_are_understood() {
        let command = Cli::command();
        for sub in command.get_subcommands() {
            let name = sub.get_name();
            let after = sub.get_after_help().unwrap_or_else(|| panic!("{name} has no examples")).to_string();
            let lines: Vec<_> = after.lines().skip(1).collect();
            assert!(after.starts_with("Examples:\n  strata ") && !lines.is_empty(), "{after}");
            for line in lines {
                let words = words(line);
                assert_eq!((words[0].as_str(), words[1].as_str()), ("strata", name), "{line}");
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{line}: {error}");
                }
                assert!(line.chars().count() <= 100, "{line}");
            }
        }
    }
}
