# Debian's cross compiler: gcc-aarch64-linux-gnu. The libraries' headers of the build machine serve,
# so the result is compiled, not linked (NEP_BUILD_TESTS and NEP_BUILD_TOOLS are off).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
