/* lib.h's reporting as a Linux program, so that a guest without privileged instructions runs on the bare processor. */
#include "lib.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *command_line = "";
unsigned failures;

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
}
void check(const char *name, u64 got, u64 want)
{
    if (got == want) {
        say("ok %s\n", name);
    } else {
        failures++;
        say("FAIL %s got 0x%lx want 0x%lx\n", name, got, want);
    }
}
void check_true(const char *name, bool holds) { check(name, holds, 1); }
void skip(const char *name, const char *why) { say("skip %s %s\n", name, why); }
bool starts_with(const char *text, const char *prefix) { return !strncmp(text, prefix, strlen(prefix)); }
u64 digest(u64 before, u64 value)
{
    for (int i = 0; i < 8; i++) {
        before = (before ^ (value & 0xff)) * 0x100000001b3ull;
        value >>= 8;
    }
    return before;
}
void finish(void)
{
    say(failures ? "FAIL %u\n" : "PASS\n", failures);
    exit(failures != 0);
}
int main(int count, char **arguments)
{
    if (count > 1)
        command_line = arguments[1];
    guest_main(NULL);
    finish();
}
