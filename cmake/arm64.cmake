# Debian's cross compiler (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross), to see that the host code
# compiles for arm64. The headers of the libraries are the build machine's, linked into a folder of
# their own so that its libc's headers stay out; nothing is linked with an arm64 library, so tests
# and tools are off in the preset.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

set(headers ${CMAKE_BINARY_DIR}/headers)
file(MAKE_DIRECTORY ${headers})
foreach(name hwloc hwloc.h zlib.h zconf.h infiniband rdma ucp uct ucs ucm sodium sodium.h)
  if(EXISTS /usr/include/${name})
    file(CREATE_LINK /usr/include/${name} ${headers}/${name} SYMBOLIC)
  endif()
endforeach()
set(CMAKE_C_FLAGS_INIT "-isystem ${headers} -idirafter /usr/include/x86_64-linux-gnu")
set(ZLIB_INCLUDE_DIR ${headers})
set(ZLIB_LIBRARY z)
