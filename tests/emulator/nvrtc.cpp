// NVRTC: compiles kernel sources with g++ into shared libraries, which it keeps. The "PTX" names the library, the machine
// code has it in itself, and both say by which version they were made.
#include "emulator.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

enum Result {
    success = 0,
    invalid_input = 3,
    invalid_program = 4,
    invalid_option = 5,
    compilation = 6,
    internal_error = 11,
};

struct Program {
    std::string source, name, log, ptx, machine_code;
};

const int architectures[] = {80, 89, 90};

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

bool write_file(const std::string& path, const std::string& content) {
    std::ofstream file(path, std::ios::binary);
    file << content;
    return bool(file.flush());
}

std::string quoted(const std::string& text) {
    std::string result = "'";
    for (char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return result + "'";
}

/// FNV-1a, twice with different beginnings: names files, guards against nothing.
std::string hash(const std::string& text) {
    char result[33];
    uint64_t a = 0xcbf29ce484222325, b = 0x9ae16a3b2f90404f;
    for (unsigned char c : text) {
        a = (a ^ c) * 0x100000001b3;
        b = (b ^ c) * 0x100000001b3;
        b ^= b >> 29;
    }
    snprintf(result, sizeof result, "%016lx%016lx", (unsigned long)a, (unsigned long)b);
    return result;
}

/// Runs a command and returns whether it succeeded; its output is added to the log.
bool run(const std::string& command, std::string& log) {
    FILE* pipe = popen((command + " 2>&1").c_str(), "re");
    if (!pipe) {
        log += "cannot start a process\n";
        return false;
    }
    char buffer[4096];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) log.append(buffer, n);
    int status = pclose(pipe);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool in_word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_'; }

/// The position behind the bracket that closes the one at `open`.
size_t behind_brackets(const std::string& text, size_t open) {
    int depth = 0;
    for (size_t i = open; i < text.size(); i++) {
        if (text[i] == '(') depth++;
        if (text[i] == ')' && --depth == 0) return i + 1;
    }
    return text.size();
}

/// The text up to the first comma that no bracket encloses.
std::string first_argument(const std::string& text) {
    int depth = 0;
    for (size_t i = 0; i < text.size(); i++) {
        if (strchr("([{", text[i])) depth++;
        if (strchr(")]}", text[i])) depth--;
        if (text[i] == ',' && depth == 0) return text.substr(0, i);
    }
    return text;
}

/// Takes kernel.h's marks out of a preprocessed source and returns, per kernel, what the driver looks for: a
/// description with a function that calls it.
std::string describe_kernels(std::string& text) {
    static const std::string mark = "__emulator_global__", bounds_mark = "__emulator_bounds__";
    std::set<std::string> seen;
    std::string descriptions;
    for (size_t at = 0; (at = text.find(mark, at)) != std::string::npos;) {
        text.replace(at, mark.size(), mark.size(), ' ');
        size_t before = text.find_last_not_of(" \t\n", at);
        // A template is no kernel by itself; only what instantiates it can be launched.
        bool is_template = before != std::string::npos && text[before] == '>';

        std::string limit = "1024", name;
        for (size_t i = at; i < text.size();) {
            if (text[i] == '#') {  // a line marker
                i = std::min(text.find('\n', i), text.size());
            } else if (!in_word(text[i])) {
                i++;
            } else {
                size_t end = i;
                while (end < text.size() && in_word(text[end])) end++;
                std::string word = text.substr(i, end - i);
                size_t open = text.find_first_not_of(" \t\n", end);
                bool bracket = open != std::string::npos && text[open] == '(';
                size_t close = bracket ? behind_brackets(text, open) : end;
                if (word == bounds_mark) {
                    limit = first_argument(text.substr(open + 1, close - open - 2));
                    for (size_t j = i; j < close; j++)
                        if (text[j] != '\n') text[j] = ' ';
                } else if (bracket && word != "__attribute__") {
                    name = word;
                    break;
                }
                i = close;
            }
        }
        if (name.empty() || is_template || !seen.insert(name).second) continue;
        descriptions += "extern \"C\" { extern const emulator::Kernel emulator_kernel_" + name +
                        "; const emulator::Kernel emulator_kernel_" + name + " = emulator::Entry<&::" + name +
                        ">::kernel(\"" + name + "\", (" + limit + ")); }\n";
    }
    // Bounds on a template remain without their mark.
    for (size_t at; (at = text.find(bounds_mark)) != std::string::npos;) {
        size_t close = behind_brackets(text, at);
        for (size_t j = at; j < close; j++)
            if (text[j] != '\n') text[j] = ' ';
    }
    return descriptions;
}

/// The options that mean something to g++, ready for a shell. The others (the architecture, fast math) do not apply.
bool pass_options(int count, const char* const* options, std::string& result) {
    auto value = [](const std::string& option, const char* prefix, std::string& rest) {
        size_t length = strlen(prefix);
        if (option.compare(0, length, prefix) != 0) return false;
        rest = option.substr(length);
        return true;
    };
    for (int i = 0; i < count; i++) {
        if (!options || !options[i]) return false;
        std::string option = options[i], rest;
        for (auto [prefix, flag] : {std::pair{"--define-macro=", "-D"}, {"-D", "-D"}, {"--undefine-macro=", "-U"},
                                    {"-U", "-U"}, {"--include-path=", "-I"}, {"-I", "-I"}}) {
            if (!value(option, prefix, rest)) continue;
            if (rest.empty() && (++i >= count || !options[i])) return false;
            result += " " + quoted(flag + (rest.empty() ? std::string(options[i]) : rest));
            break;
        }
    }
    return true;
}

/// Whether the architecture is known, and whether it is one of machines: of a virtual one there is PTX only.
bool pass_architecture(int count, const char* const* options, bool& has_machine_code) {
    has_machine_code = false;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        for (std::string prefix : {"--gpu-architecture=", "-arch="}) {
            if (option.compare(0, prefix.size(), prefix) != 0) continue;
            std::string name = option.substr(prefix.size());
            bool is_known = false;
            for (int known : architectures) {
                has_machine_code |= name == "sm_" + std::to_string(known);
                is_known |= has_machine_code || name == "compute_" + std::to_string(known);
            }
            if (!is_known) return false;
        }
    }
    return true;
}

std::string cache_folder() {
    const char* chosen = getenv("EMULATOR_CACHE");
    std::string folder = chosen && *chosen ? chosen : emulator::library_folder() + "/kernels";
    for (size_t slash = 1; slash != std::string::npos;) {
        slash = folder.find('/', slash + 1);
        mkdir(folder.substr(0, slash).c_str(), 0777);
    }
    char* absolute = realpath(folder.c_str(), nullptr);  // the library is opened later, perhaps from elsewhere
    if (absolute) folder = absolute;
    free(absolute);
    return folder;
}

int compile(Program& program, const std::string& options, bool has_machine_code) {
    std::string here = emulator::library_folder(), folder = cache_folder();
    const char* chosen = getenv("CXX");
    std::string compiler = chosen && *chosen ? chosen : "g++";
    // Contraction and fused operations as on a GPU, where the processor has them. Type punning through pointers is
    // common in kernels and understood by nvcc.
    std::string flags = " -O2 -std=c++20 -w -fPIC -fno-strict-aliasing -fno-exceptions -fno-rtti -fno-math-errno";
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        flags += " -march=x86-64-v3";

    // What the program was compiled with, for EMULATOR_TRACE.
    std::string known = "extern \"C\" { extern const char emulator_options[]; const char emulator_options[] = R\"(" + options + ")\"; }\n";
    std::string key = hash(read_file(here + "/kernel.h") + '\0' + compiler + flags + options + '\0' + here + '\0' +
                           program.name + '\0' + program.source + known);
    std::string library = folder + "/" + key + ".so";
    if (access(library.c_str(), R_OK) != 0) {
        static std::atomic<int> count{0};
        std::string base = folder + "/" + key + "." + std::to_string(getpid()) + "-" + std::to_string(count++);
        std::string source = base + ".cpp", expanded = base + ".ii", result = base + ".so";
        std::string line = "#include \"kernel.h\"\n#line 1 \"" + program.name + "\"\n" + program.source + "\n" + known;
        bool built = write_file(source, line) &&
                     run(compiler + flags + options + " -I" + quoted(here) + " -E -o " + quoted(expanded) + " " +
                             quoted(source),
                         program.log);
        if (built) {
            std::string text = read_file(expanded), kernels = describe_kernels(text);
            built = write_file(expanded, text + "\n# 1 \"(the kernels' descriptions)\"\n" + kernels) &&
                    run(compiler + flags + " -shared -o " + quoted(result) + " " + quoted(expanded) + " -L" +
                            quoted(here) + " -lemulator -Wl,-z,defs -Wl,-rpath," + quoted(here),
                        program.log) &&
                    rename(result.c_str(), library.c_str()) == 0;
        }
        for (auto& path : {source, expanded, result}) unlink(path.c_str());
        if (!built) return compilation;
    }
    std::string version = std::to_string(emulator::library_version("EMULATOR_NVRTC"));
    program.ptx = "// emulated PTX " + version + "\n" + library + "\n";
    if (has_machine_code) {
        std::string code = read_file(library);
        program.machine_code =
            "// emulated machine code " + version + "\n" + std::to_string(code.size()) + "\n" + code;
    }
    return success;
}

}  // namespace

API int nvrtcVersion(int* major, int* minor) {
    if (!major || !minor) return invalid_input;
    int version = emulator::library_version("EMULATOR_NVRTC");
    *major = version / 1000;
    *minor = version % 1000 / 10;
    return success;
}

API int nvrtcCreateProgram(Program** result, const char* source, const char* name, int headers, const char* const*,
                           const char* const*) {
    if (!result || !source || headers != 0) return invalid_input;
    *result = new Program{source, name && *name ? name : "kernels.cu", "", "", ""};
    return success;
}

API int nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return invalid_program;
    delete *program;
    *program = nullptr;
    return success;
}

API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!program) return invalid_program;
    std::string passed;
    bool has_machine_code;
    if (!pass_options(count, options, passed) || !pass_architecture(count, options, has_machine_code))
        return invalid_option;
    program->log.clear();
    program->ptx.clear();
    program->machine_code.clear();
    return compile(*program, passed, has_machine_code);
}

static int text_size(Program* program, const std::string& text, size_t* size) {
    if (!program) return invalid_program;
    if (!size) return invalid_input;
    *size = text.size() + 1;
    return success;
}

static int copy_text(Program* program, const std::string& text, char* to) {
    if (!program) return invalid_program;
    if (!to) return invalid_input;
    memcpy(to, text.c_str(), text.size() + 1);
    return success;
}

API int nvrtcGetPTXSize(Program* program, size_t* size) {
    return program && program->ptx.empty() ? invalid_program : text_size(program, program->ptx, size);
}
API int nvrtcGetPTX(Program* program, char* to) {
    return program && program->ptx.empty() ? invalid_program : copy_text(program, program->ptx, to);
}
// Machine code has no end of its own: its size is exact. There is none (0) for a virtual architecture.
API int nvrtcGetCUBINSize(Program* program, size_t* size) {
    if (!program || program->ptx.empty()) return invalid_program;
    if (!size) return invalid_input;
    *size = program->machine_code.size();
    return success;
}
API int nvrtcGetCUBIN(Program* program, char* to) {
    if (!program || program->ptx.empty()) return invalid_program;
    if (!to) return invalid_input;
    memcpy(to, program->machine_code.data(), program->machine_code.size());
    return success;
}
API int nvrtcGetProgramLogSize(Program* program, size_t* size) { return text_size(program, program->log, size); }
API int nvrtcGetProgramLog(Program* program, char* to) { return copy_text(program, program->log, to); }

API int nvrtcGetNumSupportedArchs(int* count) {
    if (!count) return invalid_input;
    *count = std::size(architectures);
    return success;
}

API int nvrtcGetSupportedArchs(int* supported) {
    if (!supported) return invalid_input;
    memcpy(supported, architectures, sizeof architectures);
    return success;
}

API const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case success: return "NVRTC_SUCCESS";
        case invalid_input: return "NVRTC_ERROR_INVALID_INPUT";
        case invalid_program: return "NVRTC_ERROR_INVALID_PROGRAM";
        case invalid_option: return "NVRTC_ERROR_INVALID_OPTION";
        case compilation: return "NVRTC_ERROR_COMPILATION";
        case internal_error: return "NVRTC_ERROR_INTERNAL_ERROR";
        default: return "NVRTC_ERROR unknown";
    }
}
