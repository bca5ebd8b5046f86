# The image for those who have Docker: the same programs, user and entry point as `make image`, which needs none and adds
# a bill of materials (deploy/image). FROM scratch: no shell, no CA roots (the control plane's root is mounted). The
# proxy needs no privilege; the agent's pod says that it is root.
#
#   docker build --platform linux/arm64 --build-arg VERSION=v0.1.0 .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS=linux TARGETARCH
ARG VERSION=devel
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOWORK=off \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION -X main.release=$VERSION" -o /out/ \
    $(for main in cmd/*/main.go; do echo "./$(dirname $main)"; done)

FROM scratch
COPY --from=build /out/ /usr/local/bin/
COPY LICENSE /LICENSE
ENV PATH=/usr/local/bin
WORKDIR /
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ztun-proxy"]
