/* SPDX-License-Identifier: Apache-2.0 */
/* Linked with -Wl,--wrap=_exit into coverage builds: forked ranks end by _exit, which would lose
 * what they ran. */
void __gcov_dump(void);
void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((noreturn));

void __wrap__exit(int status)
{
    __gcov_dump();
    __real__exit(status);
}
