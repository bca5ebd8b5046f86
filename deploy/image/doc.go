// Image builds ztun's container image without Docker: the programs for each
// architecture, FROM nothing, as an OCI layout and as archives that
// `ctr images import` and `docker load` take.
//
// Two builds of one commit by one Go release are the same bytes: programs are
// built with -trimpath and without a VCS stamp, files are in one order and carry
// one time (SOURCE_DATE_EPOCH, else 1970), and nothing else goes in.
//
//	image -source ../.. -out ../../bin/image -name ztun -version v1.0.0 -arch amd64,arm64
//
// It writes to the directory given by -out:
//
//	ztun-v1.0.0.oci.tar           an OCI layout with an index of all architectures
//	ztun-v1.0.0-amd64.docker.tar  one image in Docker's format, for each architecture
//	ztun-v1.0.0-amd64.cdx.json    what is in it (CycloneDX), the same file as in the image
//
// The image has no CA roots: a proxy believes the control plane by the root
// that is mounted into it, and nobody else by the system's.
package main
