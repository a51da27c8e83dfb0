# libnearep from the folders' objects, twice: the shared library that users get, and a static one
# with every symbol for the tests and tools, which also use inner headers.
set(objects)
foreach(folder nep_base nep_transport nep_placement nep_dispatch nep_cuda)
  if(NOT TARGET ${folder})
    continue()
  endif()
  get_target_property(type ${folder} TYPE)
  if(type STREQUAL OBJECT_LIBRARY)
    list(APPEND objects $<TARGET_OBJECTS:${folder}>)
  endif()
endforeach()
set(links Threads::Threads ZLIB::ZLIB PkgConfig::HWLOC PkgConfig::SODIUM m rt ${CMAKE_DL_LIBS})
if(NEP_HAVE_CUDA)
  # The static run-time library opens the driver lazily: the result also starts where there is no GPU.
  list(APPEND links CUDA::cudart_static)
endif()

add_library(nearep SHARED ${objects})
add_library(nearep::nearep ALIAS nearep)
set_target_properties(nearep PROPERTIES
  LINKER_LANGUAGE C VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}
  LINK_DEPENDS ${CMAKE_SOURCE_DIR}/cmake/nearep.map)
target_link_options(nearep PRIVATE -Wl,--version-script=${CMAKE_SOURCE_DIR}/cmake/nearep.map)
if(NEP_WERROR AND NOT NEP_SANITIZE AND NOT CMAKE_CROSSCOMPILING)
  target_link_options(nearep PRIVATE -Wl,--no-undefined)
endif()
target_include_directories(nearep INTERFACE
  $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(nearep PRIVATE ${links} $<BUILD_INTERFACE:nep_flags>)

add_library(nearep_static STATIC ${objects})
set_target_properties(nearep_static PROPERTIES LINKER_LANGUAGE C)
target_link_libraries(nearep_static PUBLIC nep_flags ${links})
