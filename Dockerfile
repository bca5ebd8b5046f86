# Static binaries in an image FROM scratch. The proxy is non-root and needs no
# capability; the other programs are there for the pods that say so.
#
#   docker build --platform linux/arm64 --build-arg VERSION=v0.1.0 .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS=linux TARGETARCH TARGETVARIANT
ARG VERSION=devel
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION -X main.release=$VERSION" -o /out/ \
    $(for main in cmd/*/main.go; do echo "./$(dirname $main)"; done)

FROM scratch
COPY --from=build /out/ /usr/local/bin/
COPY LICENSE /LICENSE
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/ztun-proxy"]
